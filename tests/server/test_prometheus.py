"""Rules and alerts in a real Prometheus: what it computes is what the engine and the answers reported."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import watched as watched_server
import yaml
from watched import CONFIGS, PHASE_MS, eventually

RULES = CONFIGS / "prometheus"


def rules(name):
    return [rule for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments, cwd=RULES):
    if reason := watched_server.missing():
        pytest.skip(reason)
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_configuration_is_valid():
    code, output = promtool("check", "config", "prometheus.yml")
    assert code == 0, output
    assert "2 rule files found" in output
    code, output = promtool("check", "rules", "--lint=all", "recording.yml", "alerts.yml")
    assert code == 0, output


@pytest.fixture
def alert_tests():
    return yaml.safe_load((Path(__file__).parent / "alerts_test.yml").read_text())


def checks(tests):
    return [check for case in tests["tests"] for check in case["alert_rule_test"]]


def test_alerts_fire_when_they_should_and_not_before(alert_tests, tmp_path):
    actions = {rule["alert"]: rule["annotations"]["action"] for rule in rules("alerts.yml")}
    for check in checks(alert_tests):
        for alert in check["exp_alerts"]:
            alert["exp_annotations"]["action"] = actions[check["alertname"]]
    alert_tests["rule_files"] = [str(RULES / "recording.yml"), str(RULES / "alerts.yml")]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(alert_tests))
    code, output = promtool("test", "rules", str(tmp_path / "tests.yml"))
    assert code == 0, output


def test_every_alert_is_tested_both_ways_and_says_what_to_do(alert_tests):
    checked = checks(alert_tests)
    for rule in rules("alerts.yml"):
        mine = [check for check in checked if check["alertname"] == rule["alert"]]
        assert any(check["exp_alerts"] for check in mine), rule["alert"]
        assert any(not check["exp_alerts"] for check in mine), rule["alert"]
        assert len(rule["annotations"]["action"]) > 100
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]


def test_a_broken_rule_would_be_seen(tmp_path):
    shutil.copytree(RULES, tmp_path, dirs_exist_ok=True)
    alerts = tmp_path / "alerts.yml"
    alerts.write_text(alerts.read_text().replace("min_over_time(", "least_over_time("))
    assert promtool("check", "config", "prometheus.yml", cwd=tmp_path)[0] != 0


def test_counters_are_what_the_answers_report(watched):
    reports = [answer["metrics"]["speculative_decoding"] for answer in watched.answers]
    usages = [answer["usage"] for answer in watched.answers]
    # The request that hung up has no answer: what it did is known to the engine alone.
    value, total = watched.prometheus.value, watched.engine.total
    for metric, field, of in (
        ("num_drafts", "num_spec_steps", lambda row: row.n_kept > 0),
        ("num_draft_tokens", "num_draft_tokens", lambda row: row.n_draft),
        ("num_accepted_tokens", "num_accepted_draft_tokens", lambda row: row.n_accepted),
    ):
        found = value(f"dspark:spec_decode_{metric}_total")
        assert found == total(of) == value(f"vllm:spec_decode_{metric}_total")
        assert found >= sum(report[field] for report in reports) > 0
    assert value("dspark:spec_kept_tokens_total") == total(lambda row: row.n_kept)
    histogram = {}
    for report in reports:
        for accepted, count in report["acceptance_histogram"].items():
            histogram[int(accepted)] = histogram.get(int(accepted), 0) + count
    per_position = {
        int(labels["position"]): found
        for labels, found in watched.prometheus.query("dspark:spec_decode_num_accepted_tokens_per_pos_total")
    }
    assert sorted(per_position) == [0, 1, 2, 3, 4]
    for position, found in per_position.items():
        assert found == total(lambda row, position=position: row.n_accepted > position)
        assert found >= sum(count for accepted, count in histogram.items() if accepted > position)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert value('dspark:request_success_total{finished_reason="length"}') == len(usages)
    assert value('dspark:request_success_total{finished_reason="abort"}') == 1
    assert generated <= value("dspark:generation_tokens_total") <= generated + 200
    assert value("dspark:num_preemptions_total") == watched.engine.stats().num_preemptions > 0
    assert value("dspark:prefix_cache_hits_total") >= sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)


def test_rules_give_what_the_engine_reported(watched):
    total, steps = watched.engine.total, len(watched.engine.reports)
    drafted, kept = total(lambda row: row.n_draft), total(lambda row: row.n_kept)
    drafts, accepted = total(lambda row: row.n_kept > 0), total(lambda row: row.n_accepted)
    skipped = [
        sum(report.budget.skipped.get(r, 0) for report in watched.engine.reports) for r in ("cost", "acceptance")
    ]
    expected = {
        "acceptance_rate": accepted / drafted,
        "kept_acceptance_rate": accepted / kept,
        "mean_acceptance_length": 1 + accepted / drafts,
        "budget_tokens_per_step": kept / steps,
        "kept_share": kept / drafted,
        "speedup_estimate": sum(r.plain_ms for r in watched.engine.reports) / (steps * sum(PHASE_MS.values())),
        "step_seconds_measured_over_predicted": sum(PHASE_MS.values()) / 17.0,
    }
    for position in range(5):
        reached = total(lambda row, position=position: row.n_accepted > position)
        expected[f'acceptance_per_position:5m{{position="{position}"}}'] = reached / drafts
    for reason, rows in zip(("cost", "acceptance"), skipped, strict=True):
        expected[f'draft_skipped_rows_per_step:5m{{reason="{reason}"}}'] = rows / steps
    for name, value in expected.items():
        query = f"dspark:{name}" if "5m" in name else f"dspark:{name}:5m"
        eventually(
            lambda query=query: watched.prometheus.value(query),
            lambda found, value=value: found is not None and abs(found - value) <= 1e-6 * max(1.0, value),
        )


def test_every_rule_has_a_value_and_none_fails(watched):
    for rule in rules("recording.yml"):
        eventually(lambda rule=rule: watched.prometheus.query(rule["record"]), bool)
    groups = watched.prometheus.get("rules")["groups"]
    assert sum(len(group["rules"]) for group in groups) == len(rules("recording.yml")) + len(rules("alerts.yml"))
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    assert {target["health"] for target in watched.prometheus.get("targets")["activeTargets"]} == {"up"}


def test_rules_and_alerts_name_metrics_that_exist(watched):
    """An alert on a metric that nobody exports is silent, which looks like health."""
    known = set(watched.prometheus.get("label/__name__/values"))
    for rule in rules("recording.yml") + rules("alerts.yml"):
        named = set(re.findall(r"dspark:[\w:]+", rule["expr"]))
        assert named <= known, named - known


def test_the_documentation_lists_the_rules_and_the_alerts():
    text = (CONFIGS.parent / "docs" / "metrics.md").read_text()
    assert re.findall(r"^\| `(dspark:\w+:5m)` \|", text, re.MULTILINE) == [r["record"] for r in rules("recording.yml")]
    assert re.findall(r"^\| `(Dspark\w+)` \|", text, re.MULTILINE) == [r["alert"] for r in rules("alerts.yml")]
