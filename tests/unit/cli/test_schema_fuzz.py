"""Any value at any key is a valid configuration or a message, never another exception."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from capo.cli.schema import check_values
from capo.cli.schema.scripts import SCRIPTS
from capo.cli.values import plain
from capo.errors import InputError
from capo.runtime.schema import faults, walked
from fixtures.configuration import composed
from fixtures.damage import examples

GONE = object()  # stands for the removal of a key
WORDS = [
    "",
    " ",
    "null",
    "auto",
    "looks",
    "???",
    "a/b",
    "..",
    "${seed}",
    "${",
    "_target_",
    "x" * 3000,
    "\x1b[31m",
]
HUGE = {"HUGE": 10**5000, "-HUGE": -(10**5000)}  # words for numbers that Python does not write
numbers = st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308, 5e-324, -0.0]) | st.integers()
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
    | st.binary(max_size=4)
    | st.sampled_from(sorted(HUGE))
)
names = st.text(max_size=6) | st.sampled_from([*WORDS, "scorer", "beta", "rank", "_partial_", "_args_"])
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = {
    name: sorted(
        {key.replace("NAME", "looks") for key, _ in walked(script)} | {"new", "trainer.max_stepz", "1"}
    )
    for name, script in SCRIPTS.items()
}


@pytest.fixture(scope="module")
def defaults():
    return {name: plain(composed(name=name)) for name in SCRIPTS}


def real(value: object) -> object:
    """The value with numbers in place of their words."""
    if isinstance(value, dict):
        return {name: real(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [real(inner) for inner in value]
    return HUGE.get(value, value) if isinstance(value, str) else value


def changed(values: dict, key: str, value: object) -> dict:
    values = node = copy.deepcopy(values)
    *above, last = key.split(".")
    for part in above:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if value is GONE:
        node.pop(last, None)
    else:
        node[last] = real(value)
    return values


changes = st.sampled_from(sorted(SCRIPTS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.tuples(st.sampled_from(KEYS[name]), values | st.just(GONE)), min_size=1, max_size=3),
    )
)


def assert_told(defaults, change) -> None:
    name, edits = change
    found = defaults[name]
    for key, value in edits:
        found = changed(found, key, value)
    told = faults(SCRIPTS[name], found)
    assert told == faults(SCRIPTS[name], found, partial=False)
    for key, message in told.items():
        assert isinstance(message, str) and len(message) < 2000, message
        place = key.rstrip(".").rpartition(".")[0]  # a name may be of dots alone
        assert place[:300] in message, message


def test_long_names_are_shortened_wherever_a_message_has_them(defaults):
    long = "x" * 3000
    assert_told(defaults, ("evaluate", [("evaluation.rewards", {long: {}}), ("rewards", {long: 1})]))
    assert_told(defaults, ("train", [(long, {"seed": 1})]))


@examples(75)
@given(change=changes)
def test_any_value_at_any_key_is_fine_or_a_message(defaults, change):
    assert_told(defaults, change)


@pytest.mark.slow
@examples(1500)
@given(change=changes)
def test_many_values_at_any_key_are_fine_or_messages(defaults, change):
    assert_told(defaults, change)


@examples(25)
@given(change=changes)
def test_the_border_raises_input_errors_alone(defaults, change):
    name, edits = change
    cfg = OmegaConf.create(defaults[name])
    for key, value in edits:
        if value is not GONE:
            try:
                OmegaConf.update(cfg, key, real(value), merge=False, force_add=True)
            except Exception:  # what OmegaConf itself does not hold never reaches the border
                return
    try:
        check_values(cfg, SCRIPTS[name])
    except InputError as error:
        assert str(error)


@examples(40)
@given(value=values)
def test_a_whole_configuration_of_any_kind_is_fine_or_a_message(value):
    assert faults(SCRIPTS["train"], real(value))  # no such value is a whole configuration
    assert isinstance(faults(SCRIPTS["generate"], real(value), partial=True), dict)


def test_the_changes_reach_faults_and_fine_values(defaults):
    seed = defaults["train"]["seed"]
    assert faults(SCRIPTS["train"], changed(defaults["train"], "seed", seed + 1)) == {}
    assert set(faults(SCRIPTS["train"], changed(defaults["train"], "seed", GONE))) == {"seed"}
