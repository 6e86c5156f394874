from commands.compare import _flat


def test_urls_are_shown_without_their_secrets():
    values = {"data": {"url": "https://alice:password@host/d.json?token=secret", "n_facts": 3}, "seed": 1}
    assert dict(_flat(values)) == {"data.url": "https://host/d.json", "data.n_facts": "3", "seed": "1"}
