from types import SimpleNamespace

from commands.compare import _flat, _other_data


def test_urls_are_shown_without_their_secrets():
    values = {"data": {"url": "https://alice:password@host/d.json?token=secret", "n_facts": 3}, "seed": 1}
    assert dict(_flat(values)) == {"data.url": "https://host/d.json", "data.n_facts": "3", "seed": "1"}


def test_runs_without_common_records_differ_in_the_named_values():
    parameters = [
        {"seed": 0, "data": {"source": "demo", "n_facts": None}, "lora": {"rank": 4}},
        {"seed": 1, "data": {"source": "demo", "n_facts": 18}, "lora": {"rank": 8}},
    ]
    runs = [SimpleNamespace(run=SimpleNamespace(config=SimpleNamespace(parameters=values))) for values in parameters]
    assert _other_data(runs) == ": seed is 0 and 1, data.n_facts is None and 18"
    assert _other_data(runs[:1] * 2) == ""
