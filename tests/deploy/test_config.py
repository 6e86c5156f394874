import pytest

from deploy.config import DeployConfig


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": "moon"}, "DeployConfig.target"),
        ({"host": "localhost"}, "DeployConfig.host is 'localhost'; it must be an IPv4 address"),
        ({"port": 0}, "DeployConfig.port is 0; it must be from 1 to 65535"),
        ({"memory": "lots"}, "DeployConfig.memory is 'lots'; it must be a number with m or g, like 2g"),
        ({"memory": "64m"}, "it must be a number with m or g, like 2g, at least 100m, or empty"),
        ({"require_stage": "live"}, "DeployConfig.require_stage"),
        ({"target": "kubernetes"}, "DeployConfig.image is ''"),
        ({"target": "kubernetes", "image": "host:5000/gpt2"}, "DeployConfig.image"),
        ({"target": "kubernetes", "image": "gpt2:latest"}, "DeployConfig.image"),
        ({"image": "gpt2@sha256:12"}, "DeployConfig.image"),
        *[
            ({"image": image}, "DeployConfig.image")
            for image in ("GPT2:1", "my image:1", "x:é", "x:-1", "http://reg/x:1")
        ],
        ({"image": f"x:{'1' * 129}"}, "DeployConfig.image"),
        ({"namespace": "Mine"}, "DeployConfig.namespace"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_the_rule(values, named):
    with pytest.raises(ValueError, match="it must be") as error:
        DeployConfig(**values)
    assert named in str(error.value)


IMAGES = [
    "gpt2:1",
    "host:5000/team/gpt2:1.2-rc",
    "[fd00::1]:5000/gpt2:V_1",
    "registry.example/a__b/c.d--e:1",
    f"gpt2@sha256:{'0' * 64}",
    f"localhost/gpt2:latest@sha256:{'0' * 64}",
]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_a_tag_or_a_digest(image):
    assert DeployConfig(target="kubernetes", image=image).image == image
