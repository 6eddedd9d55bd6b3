"""Arguments from a YAML file and flags, typed by one parser."""

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_modx.yaml_arguments import parse_arguments


@dataclass
class Arguments:
    learning_rate: float = 0.5
    num_phases: int | None = None
    save_strategy: str = "steps"
    recipe: str = field(default="modx", metadata={"choices": ["modx", "finetune"]})
    recipe_args: str = "{}"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    styles: list[str] = field(default_factory=list)
    dry_run: bool = False
    shuffle: bool = True
    output_dir: str = "out"

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError("learning_rate must not be negative.")


@dataclass
class OtherArguments:
    seed: int = 42


@pytest.fixture
def parse(tmp_path):
    """Arguments from the text of a config file and flags."""

    def parsed(text: str, *flags: str, **options) -> Arguments:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        (arguments,) = parse_arguments((Arguments,), [str(path), *flags], **options)
        return arguments

    return parsed


@pytest.fixture
def usage_error(parse, capsys):
    """What a usage error says on standard error."""

    def message(text: str, *flags: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(text, *flags)
        assert exit_.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return message


def test_without_arguments_the_defaults_hold():
    assert parse_arguments((Arguments,), []) == (Arguments(),)


def test_flags_alone():
    (arguments,) = parse_arguments((Arguments,), ["--learning_rate", "1e-4", "--num_phases=3", "--dry_run"])
    assert (arguments.learning_rate, arguments.num_phases, arguments.dry_run) == (1e-4, 3, True)


def test_several_dataclasses_are_filled_in_their_order(tmp_path):
    (tmp_path / "c.yml").write_text("seed: 7\nnum_phases: 2\n")
    arguments, other = parse_arguments((Arguments, OtherArguments), [str(tmp_path / "c.yml")])
    assert (arguments.num_phases, other.seed) == (2, 7)


def test_number_without_a_point_is_a_float(parse):
    assert parse("learning_rate: 1e-4").learning_rate == 1e-4


def test_no_stays_the_word(parse):
    assert parse("save_strategy: no").save_strategy == "no"


@pytest.mark.parametrize("text", ["2024-01-01", "0x10", "007", "1_000", "on"])
def test_what_yaml_would_turn_into_something_else_stays_as_written(parse, text):
    assert parse(f"save_strategy: {text}").save_strategy == text


def test_text_that_looks_like_a_flag_is_a_value(parse):
    assert parse("save_strategy: --dry_run").save_strategy == "--dry_run"


def test_lists(parse):
    arguments = parse("betas: [0.8, 1e-1]\nstyles:\n- flat\n- no\n")
    assert (arguments.betas, arguments.styles) == ([0.8, 0.1], ["flat", "no"])


def test_mapping_becomes_json_with_typed_values(parse):
    found = json.loads(
        parse("recipe_args:\n  alpha: 20\n  lr: 1e-4\n  kind: no\n  screen: true\n  hard: False").recipe_args
    )
    assert found == {"alpha": 20, "lr": 1e-4, "kind": "no", "screen": True, "hard": False}
    assert type(found["alpha"]) is int


def test_mapping_is_typed_at_every_depth(parse):
    text = "recipe_args: {betas: [0.9, 1], inner: {steps: 3, none: null, empty: , when: 2024-01-01, text: 'a: b: c'}}"
    assert json.loads(parse(text).recipe_args) == {
        "betas": [0.9, 1],
        "inner": {"steps": 3, "none": None, "empty": None, "when": "2024-01-01", "text": "a: b: c"},
    }


def test_json_written_as_text_stays_as_it_is(parse):
    assert parse("""recipe_args: '{"alpha": 20}'""").recipe_args == '{"alpha": 20}'


def test_mappings_in_a_list_become_json(parse):
    assert parse("styles: [{a: 1}, b]").styles == ['{"a": 1}', "b"]


@pytest.mark.parametrize("nothing", ["", "null", "~", '""'])
def test_null_keeps_the_default(parse, nothing):
    assert parse(f"learning_rate: {nothing}\nnum_phases: {nothing}\nstyles: {nothing}") == Arguments()


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("yes", True), ("no", False), ("1", True)]
)
def test_truth_values(parse, text, value):
    arguments = parse(f"dry_run: {text}\nshuffle: {text}")
    assert (arguments.dry_run, arguments.shuffle) == (value, value)


def test_flags_override_the_file(parse):
    arguments = parse("learning_rate: 1\nnum_phases: 5\nbetas: [1, 2, 3]", "--learning_rate", "2", "--betas", "4")
    assert (arguments.learning_rate, arguments.num_phases, arguments.betas) == (2.0, 5, [4.0])


def test_hyphens_name_the_same_option(parse):
    assert parse("num-phases: 5").num_phases == 5


# --- usage errors ----------------------------------------------------------------------------------------------------


def test_unknown_key_is_named_with_the_nearest_one(usage_error):
    message = usage_error("learning_rte: 1e-4")
    assert "no option 'learning_rte'. Did you mean 'learning_rate'?" in message
    assert "config.yaml" in message


def test_unknown_key_like_no_other_is_named(usage_error):
    assert "no option 'zzzzzzz'.\n" in usage_error("zzzzzzz: 1")


def test_list_for_one_value_is_named(usage_error):
    assert "config.yaml: learning_rate takes one value, not the list" in usage_error("learning_rate: [1e-4, 1e-3]")


def test_unknown_flag_is_named(usage_error):
    assert "--learning_rte" in usage_error("num_phases: 3", "--learning_rte", "1")


def test_value_of_another_type_is_named(usage_error):
    message = usage_error("learning_rate: fast")
    assert "--learning_rate" in message
    assert "'fast'" in message


def test_value_out_of_the_choices_is_named(usage_error):
    assert "'zscll'" in usage_error("recipe: zscll")


def test_value_that_the_dataclass_refuses_is_a_usage_error(usage_error):
    assert "learning_rate must not be negative." in usage_error("learning_rate: -1")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_file_that_is_no_mapping_is_a_usage_error(usage_error, text):
    assert "must hold a mapping" in usage_error(text)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\x00", "? [a]\n: c", "styles: &a [*a]", "a: " + "[" * 1000])
def test_file_that_is_no_yaml_is_a_usage_error(usage_error, text):
    assert "error:" in usage_error(text)


def test_file_that_is_not_there_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments((Arguments,), [str(tmp_path / "lost.yaml")])
    assert exit_.value.code == 2
    assert "lost.yaml" in capsys.readouterr().err


def test_file_that_is_no_text_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SystemExit) as exit_:
        parse_arguments((Arguments,), [str(tmp_path / "c.yaml")])
    assert exit_.value.code == 2


def test_second_file_is_a_usage_error(usage_error):
    assert "other.yaml" in usage_error("num_phases: 3", "other.yaml")


yaml_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
yaml_lines = st.lists(
    st.tuples(st.sampled_from([*Arguments.__dataclass_fields__, "help", "no_shuffle", "other"]), yaml_text)
).map(lambda lines: "\n".join(f"{key}: {value}" for key, value in lines))


@settings(max_examples=50, deadline=None)
@given(text=yaml_text | yaml_lines)
def test_any_text_gives_arguments_or_a_usage_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        (arguments,) = parse_arguments((Arguments,), [str(path)])
    except SystemExit:
        return
    assert isinstance(arguments, Arguments)


# --- defaults that depend on what was chosen -------------------------------------------------------------------------


def defaults(chosen, given) -> dict:
    return {"output_dir": f"runs/{chosen.recipe}", "learning_rate": 1e-3 if "recipe" in given else 1e-2}


def test_defaults_can_depend_on_what_was_chosen(parse):
    arguments = parse("recipe: finetune", defaults=defaults)
    assert (arguments.output_dir, arguments.learning_rate) == ("runs/finetune", 1e-3)


@pytest.mark.parametrize("flag", ["--output-dir", "--output_d"])
def test_an_option_is_given_however_it_is_spelt(parse, flag):
    def seen(chosen, given):
        return {"styles": sorted(given)}

    assert parse("recipe: finetune", flag, "mine", "--no_shuffle", defaults=seen).styles == [
        "output_dir",
        "recipe",
        "shuffle",
    ]


def test_file_and_flags_override_such_defaults(parse):
    arguments = parse("learning_rate: 2", "--output_dir", "mine", defaults=defaults)
    assert (arguments.output_dir, arguments.learning_rate) == ("mine", 2.0)
