import pytest

from deploy.config import DeployConfig
from steps.config import (
    BaseConfig,
    DataConfig,
    EvaluateConfig,
    PackageConfig,
    PromoteConfig,
    TrackingConfig,
)


@pytest.mark.parametrize(
    ("make", "values", "named"),
    [
        (DataConfig, {"source": "web"}, "DataConfig.source is 'web'; it must be bundled, url or file"),
        (DataConfig, {"source": "file"}, "DataConfig.path is ''"),
        (DataConfig, {"source": "url", "sha256": "12"}, "DataConfig.sha256 is '12'"),
        (DataConfig, {"order": "random"}, "DataConfig.order"),
        (DataConfig, {"n_facts": 0}, "DataConfig.n_facts is 0"),
        (DataConfig, {"val_fraction": 0.0}, "DataConfig.val_fraction"),
        (DataConfig, {"test_fraction": 0.5}, "DataConfig.test_fraction"),
        (BaseConfig, {"source": "disk"}, "BaseConfig.source"),
        (BaseConfig, {"name": "gpt3"}, "BaseConfig.name is 'gpt3'; it must be one of gpt2"),
        (EvaluateConfig, {"max_new_tokens": 0}, "EvaluateConfig.max_new_tokens is 0"),
        (EvaluateConfig, {"batch_size": 0}, "EvaluateConfig.batch_size is 0"),
        (PromoteConfig, {"stage": "live"}, "PromoteConfig.stage"),
        (PromoteConfig, {"metric": "bleu"}, "PromoteConfig.metric"),
        (PackageConfig, {"smoke_prompts": 0}, "PackageConfig.smoke_prompts is 0"),
        (DeployConfig, {"target": "moon"}, "DeployConfig.target"),
        (DeployConfig, {"host": "localhost"}, "DeployConfig.host is 'localhost'; it must be an IPv4 address"),
        (DeployConfig, {"port": 0}, "DeployConfig.port is 0; it must be from 1 to 65535"),
        (DeployConfig, {"memory": "lots"}, "DeployConfig.memory is 'lots'; it must be a number with m or g"),
        (DeployConfig, {"require_stage": "live"}, "DeployConfig.require_stage"),
        (DeployConfig, {"target": "kubernetes"}, "DeployConfig.image is ''"),
        (DeployConfig, {"target": "kubernetes", "image": "host:5000/gpt2"}, "DeployConfig.image"),
        (DeployConfig, {"target": "kubernetes", "image": "gpt2:latest"}, "DeployConfig.image"),
        (DeployConfig, {"image": "gpt2@sha256:12"}, "DeployConfig.image"),
        (DeployConfig, {"namespace": "Mine"}, "DeployConfig.namespace"),
        (TrackingConfig, {"wandb": "on"}, "TrackingConfig.wandb is 'on'; it must be off, offline or online"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(make, values, named):
    with pytest.raises(ValueError, match="it must be") as error:
        make(**values)
    assert named in str(error.value)


def test_a_bare_off_of_yaml_means_off():
    assert TrackingConfig(wandb=False).wandb == "off"


@pytest.mark.parametrize("image", ["gpt2:1", "host:5000/team/gpt2:1.2-rc", f"gpt2@sha256:{'0' * 64}"])
def test_an_image_has_a_tag_or_a_digest(image):
    assert DeployConfig(target="kubernetes", image=image).image == image


def test_a_base_of_the_hub_may_have_any_name():
    assert BaseConfig(source="hub", name="someone/else", revision="0" * 40).name == "someone/else"
