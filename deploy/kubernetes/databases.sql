-- Beside the database of the studies, which the image makes itself.
CREATE DATABASE mlflow;
