"""Logging in to an etcd that asks for it (etcd's page "Role-based access control")."""

from typing import NamedTuple

from servers.web import fetch_json


class Login(NamedTuple):
    """Who reads and writes."""

    user: str
    password: str


def log_in(url: str, login: Login | None, timeout_s: float) -> dict[str, str]:
    """Return the headers that a request needs: none without a login. Raises OSError."""
    if login is None:
        return {}
    body = {"name": login.user, "password": login.password}
    answer = fetch_json("POST", f"{url}/auth/authenticate", body, timeout_s=timeout_s)
    return {"Authorization": answer["token"]}
