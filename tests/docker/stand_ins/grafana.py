"""In Grafana's place: reads what is provisioned from where Grafana reads it, and answers on some of Grafana's paths.

/api/health, /api/dashboards/home, /api/dashboards/uid/UID, and /api/datasources/proxy/uid/UID/..., which asks the data
source by its provisioned address.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

PROVISIONING = Path("/etc/grafana/provisioning")
DATA = Path("/var/lib/grafana")


def provisioned(kind: str) -> list[Any]:
    """The entries of every file of `kind`, a directory and the key in its files."""
    key = {"dashboards": "providers"}.get(kind, kind)
    files = [file for file in sorted((PROVISIONING / kind).iterdir()) if file.suffix in (".yml", ".yaml")]
    return [entry for file in files for entry in yaml.safe_load(file.read_text(encoding="utf-8"))[key]]


def dashboards() -> dict[str, Any]:
    folders = [Path(provider["options"]["path"]) for provider in provisioned("dashboards")]
    found = [json.loads(file.read_text(encoding="utf-8")) for folder in folders for file in folder.glob("*.json")]
    return {dashboard["uid"]: dashboard for dashboard in found}


SOURCES = {source["uid"]: source["url"] for source in provisioned("datasources") if source["access"] == "proxy"}
DASHBOARDS = dashboards()
HOME = json.loads(Path(os.environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).read_text(encoding="utf-8"))
ANONYMOUS = os.environ.get("GF_AUTH_ANONYMOUS_ENABLED") == "true"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path.split("/")[1:]:
            case ["api", "health"]:
                self._answer(200, {"database": "ok"})
            case _ if not ANONYMOUS:
                self._answer(401, {"message": "Unauthorized"})
            case ["api", "dashboards", "home"]:
                self._answer(200, {"dashboard": HOME})
            case ["api", "dashboards", "uid", uid] if uid in DASHBOARDS:
                self._answer(200, {"dashboard": DASHBOARDS[uid]})
            case ["api", "datasources", "proxy", "uid", uid, *rest] if uid in SOURCES:
                self._ask(f"{SOURCES[uid]}/{'/'.join(rest)}")
            case _:
                self._answer(404, {"message": "Not found"})

    def _ask(self, url: str) -> None:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                self.send_response(response.status)
                self.end_headers()
                shutil.copyfileobj(response, self.wfile)
        except urllib.error.HTTPError as error:
            self._answer(error.code, {"message": error.read().decode()})
        except OSError as error:
            self._answer(502, {"message": f"{url}: {error}"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the first process of a container has no default
    (DATA / "grafana.db").touch()
    ThreadingHTTPServer(("", 3000), Handler).serve_forever()
