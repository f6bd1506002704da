"""Addresses are shown without the password in them, and otherwise as they are."""

import pytest

from waferlab.tracking.addresses import address_without_password, without_password


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
        ("http://me:s3@cret@mlflow:5000/x", "http://me@mlflow:5000/x"),  # which requests reads so
        ("mssql://?odbc_connect=UID%3Dme%3BPWD%3Ds3cret", "mssql://?odbc_connect="),
    ],
)  # fmt: skip
def test_only_the_password_is_left_out(address, shown):
    assert without_password(address) == shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3 cr@et@db/optuna", "postgresql://me@db/optuna"),
        ("postgresql://me@db/optuna", "postgresql://me@db/optuna"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("postgresql://db/optuna?password=s3cret", "postgresql://db/optuna?password="),
    ],
)
def test_of_what_is_an_address_alone_a_password_with_spaces_is_left_out_too(address, shown):
    assert address_without_password(address) == shown
