"""The dashboard that comes with the project: its panels, and their queries as Grafana sends them."""

import json
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana" / "dashboards" / "dspark.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def filled(expression: str) -> str:
    """The expression as Grafana sends it with `All` chosen everywhere."""
    for variable, value in (("$instance", ".*"), ("$model", ".*"), ("$__rate_interval", "5m")):
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression
