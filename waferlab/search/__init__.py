"""Optuna studies and their trials."""
