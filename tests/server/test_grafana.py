"""The dashboard against a real Prometheus, and the compose file as far as it can be checked without Docker."""

import itertools
import math
import re

import pytest
import yaml

from tests.dashboard import CONFIGS, DASHBOARD, PANELS, filled

PROVISIONING = CONFIGS / "grafana" / "provisioning"
COMPOSE = yaml.safe_load((CONFIGS / "compose.yaml").read_text())
DOCKERFILE = (CONFIGS.parent / "Dockerfile").read_text()


def provisioned(path):
    return yaml.safe_load((PROVISIONING / path).read_text())


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_every_panel_has_data(watched, panel):
    for target in panel["targets"]:
        found = watched.prometheus.query(filled(target["expr"]))
        assert found, target["expr"]
        assert all(math.isfinite(value) for _, value in found), (target["expr"], found)
        # What the legend shows of a series is there to be shown, and tells it from the others.
        labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
        assert len({tuple(metric[label] for label in labels) for metric, _ in found}) == len(found)


def test_one_choice_in_every_variable_has_data_too(watched):
    for variable in DASHBOARD["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]["query"]).groups()
        assert variable["definition"] == variable["query"]["query"]
        values = watched.prometheus.get(f"label/{label}/values", **{"match[]": metric})
        assert len(values) == 1
        for panel in PANELS:
            for target in panel["targets"]:
                assert f'{label}=~"${variable["name"]}"' in target["expr"]
                chosen = target["expr"].replace(f"${variable['name']}", re.escape(values[0]).replace("\\", "\\\\"))
                assert watched.prometheus.query(filled(chosen)), chosen
                none = target["expr"].replace(f"${variable['name']}", "another")
                assert not watched.prometheus.query(filled(none)), none


def test_panels_show_what_they_promise_where_they_promise_it():
    titles = [panel["title"] for panel in PANELS]
    assert titles[:2] == ["Acceptance rate", "Tokens per second"]
    below = ["Acceptance by position", "Budget against concurrency", "Time to first token", "Time per token"]
    below += ["K/V pool", "Prefix cache", "Predicted and measured step time"]
    assert [title for title in titles if title in below] == below
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in DASHBOARD["panels"]]
    assert places == sorted(places)
    assert all(panel["description"] for panel in PANELS)
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = set()
    for panel in everything:
        grid = panel["gridPos"]
        own = set(itertools.product(range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])))
        assert cells.isdisjoint(own), panel["title"]
        assert grid["x"] + grid["w"] <= 24
        cells |= own
    for panel in PANELS:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        legends = {target["legendFormat"] for target in panel["targets"]}
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in legends, panel["title"]


def test_panels_ask_the_provisioned_source():
    (source,) = provisioned("datasources/prometheus.yml")["datasources"]
    asked = [panel["datasource"] for panel in PANELS] + [t["datasource"] for panel in PANELS for t in panel["targets"]]
    asked += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    assert all(one == {"type": source["type"], "uid": source["uid"]} for one in asked)
    scrape = yaml.safe_load((CONFIGS / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]


def container_ports(service):
    return {int(port.rpartition(":")[2]) for port in COMPOSE["services"][service]["ports"]}


def mounts(service):
    """Container path -> what is mounted there."""
    parts = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"]]
    return {target: source for source, target, *_ in parts}


def test_services_find_each_other():
    services = COMPOSE["services"]
    scrape = yaml.safe_load((CONFIGS / "prometheus" / "prometheus.yml").read_text())
    targets = [t for job in scrape["scrape_configs"] for entry in job["static_configs"] for t in entry["targets"]]
    (source,) = provisioned("datasources/prometheus.yml")["datasources"]
    for address in [*targets, source["url"].removeprefix("http://")]:
        host, _, port = address.partition(":")
        assert int(port) in container_ports(host)
    assert re.search(r"\bDSPARK_HOST=0\.0\.0\.0 DSPARK_PORT=8000\b", DOCKERFILE)
    assert container_ports("server") == {8000}
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "server" or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "not pinned"


def test_mounted_files_exist_where_they_are_looked_for():
    for service in COMPOSE["services"]:
        for source in mounts(service).values():
            if source.startswith("."):
                assert (CONFIGS / source).is_dir()
            else:
                assert source in COMPOSE["volumes"]
    build = COMPOSE["services"]["server"]["build"]
    assert (CONFIGS / build["context"] / "Dockerfile").samefile(CONFIGS.parent / "Dockerfile")
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)
    assert COMPOSE["services"]["server"]["image"] in DOCKERFILE
    assert "/cache" in mounts("server")
    grafana = mounts("grafana")
    assert (CONFIGS / mounts("prometheus")["/etc/prometheus"] / "prometheus.yml").is_file()
    assert (CONFIGS / grafana["/etc/grafana/provisioning"]).samefile(PROVISIONING)
    (provider,) = provisioned("dashboards/dspark.yml")["providers"]
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    directory, _, name = home.rpartition("/")
    assert directory == provider["options"]["path"]
    assert (CONFIGS / grafana[directory] / name).is_file()
