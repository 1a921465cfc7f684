"""The password of a Prefect server that `fisherfold serve` starts."""

import pytest
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_API_AUTH_STRING, temporary_settings

from fisherfold.run.errors import EngineError
from flows.api_secret import lasting_secret, new_secret, secret_file, where_it_is


@pytest.fixture(autouse=True)
def home(tmp_path):
    with temporary_settings({PREFECT_HOME: tmp_path}):
        yield tmp_path


def test_it_is_drawn_once_and_only_its_user_can_read_it():
    secret = lasting_secret()
    assert secret_file().stat().st_mode & 0o777 == 0o600
    assert lasting_secret() == secret and secret_file().read_text() == f"{secret}\n"
    user, _, password = secret.partition(":")
    assert user == "fisherfold" and len(password) >= 32
    assert new_secret() != secret


def test_one_that_others_could_read_is_refused(home):
    lasting_secret()
    secret_file().chmod(0o640)
    with pytest.raises(EngineError, match="remove it"):
        lasting_secret()
    secret_file().unlink()
    secret_file().write_text("")
    secret_file().chmod(0o600)
    with pytest.raises(EngineError, match="no USER:PASSWORD"):
        lasting_secret()


def test_one_that_is_given_is_used():
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "me:mine"}):
        assert lasting_secret() == "me:mine" and "mine" not in where_it_is()
    assert not secret_file().exists()
