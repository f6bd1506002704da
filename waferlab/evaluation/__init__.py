"""Answers, scores with intervals, decisions and the statistics of many trainings; nothing is drawn here."""
