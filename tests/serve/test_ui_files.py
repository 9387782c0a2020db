"""The playground's files, as served: closed off, complete, and without a network."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from optlm.serve import ui


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    ui.mount_ui(app)
    return TestClient(app)


def test_the_page_runs_its_own_scripts_only(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    nonce = re.search(r"'nonce-([\w-]+)'", policy)
    assert nonce is not None
    assert f'content="{nonce[1]}"' in page.text
    assert nonce[1] not in client.get("/").text


def test_everything_the_page_names_is_served_here(client: TestClient) -> None:
    page = client.get("/").text
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(named) >= 6
    for address in named:
        if not address.startswith("data:"):
            found = client.get(f"/{address}")
            assert found.status_code == 200
            assert found.headers["x-content-type-options"] == "nosniff"
    script = client.get("/ui/playground.js").text
    assert not re.findall(r"https?://", page + script)


@pytest.mark.parametrize(
    "name", ["", "lib/", "lib/x.js", "../__init__.py", "lib/../../app.py", "%2e%2e/x", "index.html"]
)
def test_other_files_are_not(client: TestClient, name: str) -> None:
    assert client.get(f"/ui/{name}").status_code == 404


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "find_spec", lambda name: None)
    assert "pip install 'optlm[serve]'" in str(ui.ui_missing())
    with pytest.raises(RuntimeError, match="trame_client"):
        ui.mount_ui(FastAPI())


def test_the_libraries_python_is_not_imported() -> None:
    code = (
        "import sys; from fastapi import FastAPI; from optlm.serve.ui import mount_ui; "
        "mount_ui(FastAPI()); print([m for m in sys.modules if m.startswith('trame')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
