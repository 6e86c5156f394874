import pytest

from steps.config import (
    BaseConfig,
    DataConfig,
    EvaluateConfig,
    MonitorConfig,
    PackageConfig,
    PromoteConfig,
    TextConfig,
    TrackingConfig,
)


@pytest.mark.parametrize(
    ("make", "values", "named"),
    [
        (DataConfig, {"source": "web"}, "DataConfig.source is 'web'; it must be bundled, url, file or hub"),
        (DataConfig, {"source": "file"}, "DataConfig.path is ''"),
        *(
            (DataConfig, {"source": "file", "path": url}, f"DataConfig.path is {url!r}; it must be a path, not a URL")
            for url in ("https://host/a.jsonl", "file:///tmp/a%20b.jsonl", "hf://datasets/tatsu-lab/alpaca")
        ),
        (
            DataConfig,
            {"source": "file", "path": "a.jsonl", "test_path": "s3://a/b.jsonl"},
            "DataConfig.test_path is 's3://a/b.jsonl'; it must be a path, not a URL",
        ),
        (
            DataConfig,
            {"source": "hub", "name": "https://huggingface.co/datasets/a/b"},
            "DataConfig.name is 'https://huggingface.co/datasets/a/b'; it must be a dataset like tatsu-lab/alpaca",
        ),
        (
            BaseConfig,
            {"source": "hub", "name": "https://huggingface.co/openai-community/gpt2"},
            "BaseConfig.name is 'https://huggingface.co/openai-community/gpt2'; it must be a repository like",
        ),
        (TextConfig, {"source": "file", "path": "https://host/a.txt"}, "TextConfig.path is 'https://host/a.txt'"),
        (DataConfig, {"source": "url", "sha256": "12"}, "DataConfig.sha256 is '12'"),
        (DataConfig, {"order": "random"}, "DataConfig.order"),
        (
            DataConfig,
            {"path": "mine.json"},
            "DataConfig.path is 'mine.json'; it must be empty unless",
        ),
        (DataConfig, {"too_long": "keep"}, "DataConfig.too_long"),
        (
            MonitorConfig,
            {"max_requests": 40},
            "MonitorConfig.max_requests is 40; it must be at least min_requests (50)",
        ),
        (
            MonitorConfig,
            {"min_requests": 6000},
            "MonitorConfig.max_requests is 5000; it must be at least min_requests (6000)",
        ),
        (DataConfig, {"n_facts": 0}, "DataConfig.n_facts is 0"),
        (DataConfig, {"val_fraction": -0.1}, "DataConfig.val_fraction"),
        (DataConfig, {"test_fraction": 0.0}, "DataConfig.test_fraction"),
        (DataConfig, {"test_fraction": 0.5}, "DataConfig.test_fraction"),
        (BaseConfig, {"source": "disk"}, "BaseConfig.source"),
        (BaseConfig, {"name": "gpt3"}, "BaseConfig.name is 'gpt3'; it must be one of gpt2"),
        (EvaluateConfig, {"max_new_tokens": 0}, "EvaluateConfig.max_new_tokens is 0"),
        (EvaluateConfig, {"batch_size": 0}, "EvaluateConfig.batch_size is 0"),
        (PromoteConfig, {"stage": "live"}, "PromoteConfig.stage"),
        (PromoteConfig, {"metric": "bleu"}, "PromoteConfig.metric is 'bleu'; it must be one of exact_match"),
        (PromoteConfig, {"margin": float("nan")}, "PromoteConfig.margin is nan"),
        (PackageConfig, {"smoke_prompts": 0}, "PackageConfig.smoke_prompts is 0"),
        (TrackingConfig, {"wandb": "on"}, "TrackingConfig.wandb is 'on'; it must be off, offline or online"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_the_rule(make, values, named):
    with pytest.raises(ValueError, match="it must be") as error:
        make(**values)
    assert named in str(error.value)


def test_a_path_may_begin_with_the_home_directory_which_no_shell_replaces_here(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(source="file", path="~/a.jsonl", val_path="~/b c.jsonl", test_path="c/~/d.jsonl")
    assert [data.path, data.val_path, data.test_path] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b c.jsonl", "c/~/d.jsonl"]
    assert DataConfig(source="hub", name="~/alpaca").name == f"{tmp_path}/alpaca"
    assert BaseConfig(source="hub", name="~/gpt2").name == f"{tmp_path}/gpt2"
    assert TextConfig(source="file", path="~/a.txt").path == f"{tmp_path}/a.txt"
    assert DataConfig(source="file", path="~nobody-of-this-name/a").path == "~nobody-of-this-name/a"


def test_a_hub_base_may_have_any_name():
    assert BaseConfig(source="hub", name="someone/else", revision="0" * 40).name == "someone/else"


def test_a_base_of_the_hub_needs_a_commit_and_a_directory_needs_none(tmp_path):
    for base in (BaseConfig("hub", "someone/else", "main"), BaseConfig("hub", str(tmp_path / "missing"))):
        with pytest.raises(ValueError, match=r"BaseConfig.revision .* 40 hexadecimal digits.*is no directory"):
            base.resolved()
    base = BaseConfig("hub", "someone/else", "0" * 40)
    assert base.resolved() == (base, "")
