"""Addresses are shown without the password in them, and otherwise as they are."""

import pytest

from waferlab.tracking.addresses import without_password


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@db:5432/optuna", "postgresql+psycopg://me@db:5432/optuna"),
        ("http://me@mlflow:5000", "http://me@mlflow:5000"),
        ("http://127.0.0.1:5000 (no models:/wafer@champion)", "http://127.0.0.1:5000 (no models:/wafer@champion)"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("postgresql://me:s3/cr:et@db/optuna", "postgresql://me@db/optuna"),  # which SQLAlchemy reads so
        ("postgresql://db/optuna?user=me&password=s3cret&port=1", "postgresql://db/optuna?user=me&password=&port=1"),
        ("no answer from http://me:s3cret@mlflow (HTTPError: http://me:s3cret@mlflow/api)",
         "no answer from http://me@mlflow (HTTPError: http://me@mlflow/api)"),
    ],
)  # fmt: skip
def test_only_the_password_is_left_out(address, shown):
    assert without_password(address) == shown
