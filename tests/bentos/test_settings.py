import pytest

from bentos.settings import Settings


def test_settings_come_from_the_environment():
    environment = {"GPT2_API_TOKEN": "t", "GPT2_WEIGHTS": "int8", "GPT2_REQUEST_LOG": "", "OTHER": "x"}
    assert Settings.from_environment(environment) == Settings(api_token=("t",), weights="int8")


def test_a_token_from_a_file_has_no_line_break_and_a_blank_one_does_not_switch_authentication_off():
    assert Settings.from_environment({"GPT2_API_TOKEN": "s3cret\n"}).api_token == ("s3cret",)
    assert Settings.from_environment({"GPT2_API_TOKEN": "old, new"}).api_token == ("old", "new")
    for value in (" ", "\n", "one\ntwo", "one,", ",", "one,,two"):
        with pytest.raises(ValueError, match=r"^GPT2_ADMIN_TOKEN has a blank item, or line breaks"):
            Settings.from_environment({"GPT2_ADMIN_TOKEN": value})


def test_origins_are_compared_with_what_browsers_send():
    given = {"GPT2_CORS_ORIGINS": "https://app.example,http://localhost:5173"}
    assert Settings.from_environment(given).cors_origins == ("https://app.example", "http://localhost:5173")
    assert Settings.from_environment({"GPT2_CORS_ORIGINS": "*"}).cors_origins == ("*",)
    for value in ("app.example", "https://app.example/", "https://a.example/chat", "https://*", "null"):
        with pytest.raises(ValueError, match=r"^GPT2_CORS_ORIGINS contains .*; an origin is scheme, host and port"):
            Settings.from_environment({"GPT2_CORS_ORIGINS": value})


@pytest.mark.parametrize(
    "name", ["GPT2_API_KEY", "GPT2_API_TOKENS", "GPT2_ADMIN_TOKN", "GPT2_ADAPTER_DIR", "GPT2_WEIGHT"]
)
def test_a_misspelled_setting_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name} is not a setting; did you mean GPT2_[A-Z_]+\?$"):
        Settings.from_environment({name: "x"})


def test_variables_of_kubernetes_and_of_the_pipeline_are_no_settings():
    names = ("GPT2_INSTRUCT_SERVICE_HOST", "GPT2_INSTRUCT_OUTPUTS", "GPT2_PORT", "GPT2_SERVICE_PORT_HTTP", "API_TOKEN")
    assert Settings.from_environment(dict.fromkeys(names, "x")) == Settings()


def test_another_base_is_accepted_only_on_request():
    assert Settings.from_environment({"GPT2_ACCEPT_OTHER_BASE": "true"}).accept_other_base
    assert not Settings.from_environment({"GPT2_ACCEPT_OTHER_BASE": "false"}).accept_other_base
    with pytest.raises(ValueError, match="GPT2_ACCEPT_OTHER_BASE is 'yes'; it must be one of true, false"):
        Settings.from_environment({"GPT2_ACCEPT_OTHER_BASE": "yes"})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("WEIGHTS", "auto, fp32, bf16, int8"),
        ("REQUEST_LOG_TEXT", "hash, keep, drop"),
        ("MULTI_TURN", "last, history, refuse"),
        ("FOLLOW_ADAPTERS", "true, false"),
        ("ACCEPT_OTHER_BASE", "true, false"),
    ],
)
def test_an_unknown_value_is_refused_with_the_allowed_ones(name, choices):
    for value in ("x", "0", "-1", "nan", "[]", "True", str(2**70), " "):
        with pytest.raises(ValueError, match=f"^GPT2_{name} is .*; it must be one of {choices}$"):
            Settings.from_environment({f"GPT2_{name}": value})


@pytest.mark.parametrize(("value", "tracing"), [(None, False), ("true", False), ("false", True)])
def test_tracing_is_off_unless_asked_for(value, tracing):
    environment = {} if value is None else {"OTEL_SDK_DISABLED": value}
    assert Settings.from_environment(environment).tracing == tracing
