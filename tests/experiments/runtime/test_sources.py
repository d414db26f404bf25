"""Which changes of the source change a digest."""

import functools
import textwrap

import jax
import pytest

import glue_jax
from experiments.runtime import sources
from experiments.runtime.sources import digest, functions_in, name_of
from experiments.studies import calibration
from experiments.studies.ablation.recipes import recipes
from tests.experiments.helpers import TINY

HOUSE = {
    "house.__init__": """
        from house.tools import scale
    """,
    "house.tools": """
        RATE = 2.0

        def scale(x):
            return RATE * x

        def unused(x):
            return x
    """,
    "house.work": """
        import house
        from house import plots
        from house.tools import unused as other

        STEPS = 3
        TABLE = {"scale": house.scale}

        class Recipe:
            def apply(self, x):
                return TABLE["scale"](x)

        def compute(recipe: Recipe, x):
            '''Computes.'''
            if x < 0:
                raise ValueError(f"x is {x}")
            # In steps.
            for _ in range(STEPS):
                x = recipe.apply(x)
            return x

        def report(x):
            return plots.draw(x)
    """,
    "house.plots": """
        def draw(x):
            return x
    """,
}


CACHES = sources.digest, sources._definition, sources._parse, sources._root


def digest_of(tmp_path, monkeypatch, changes=(), names=("house.work:compute",), **words):
    """Of the house, after changes: (module, before, after)."""
    monkeypatch.setattr(sources, "_PACKAGES", ("house",))
    texts = dict(HOUSE)
    for module, before, after in changes:
        assert before in texts[module]
        texts[module] = texts[module].replace(before, after)
    for module, text in texts.items():
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    for function in CACHES:
        function.cache_clear()
    try:
        return digest(*names, **words)
    finally:
        for function in CACHES:
            function.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        ("house.tools", "RATE = 2.0", "RATE = 3.0"),
        ("house.tools", "RATE * x", "x * RATE"),
        ("house.work", "STEPS = 3", "STEPS = 4"),
        ("house.work", "x < 0", "x < 1"),
        ("house.work", "raise ValueError", "raise TypeError"),
        # By a table, and by a method that an annotation leads to.
        ("house.work", "house.scale}", "house.tools.unused}"),
        ("house.work", 'TABLE["scale"](x)', 'TABLE["scale"](2 * x)'),
        ("house.tools", "RATE = 2.0", "RATE = 2.0\n        print('at import')"),
        ("house.__init__", "import scale", "import unused as scale"),
    ],
)
def test_what_a_function_reaches_counts(change, tmp_path, monkeypatch):
    assert digest_of(tmp_path, monkeypatch, [change]) != digest_of(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        ("house.work", "'''Computes.'''", "'''Computes in steps.'''"),
        ("house.work", "# In steps.", "# One after another."),
        ("house.work", "x):\n            '''", "x: float) -> float:\n            '''"),
        ("house.work", "x is {x}", "x is {x}; expected at least 0"),
        ("house.plots", "return x", "return -x"),
        ("house.tools", "def unused(x):\n            return x", "def unused(x):\n            return -x"),
        ("house.work", "plots.draw(x)", "plots.draw(-x)"),
    ],
)
def test_what_it_does_not_reach_and_what_decides_nothing_does_not_count(change, tmp_path, monkeypatch):
    assert digest_of(tmp_path, monkeypatch, [change]) == digest_of(tmp_path, monkeypatch)


def of(texts, tmp_path, monkeypatch):
    """The digest of `house.work:compute` in another house."""
    monkeypatch.setattr("tests.experiments.runtime.test_sources.HOUSE", {"house.__init__": "", **texts})
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    return digest_of(folder, monkeypatch)


def work(begin, text="def compute(): return f() - g()"):
    return {"house.work": f"{begin}\n{text}"}


def two_places(first, second):
    return {
        "house.a": f"S = {first}\ndef f(): return S",
        "house.b": f"S = {second}\ndef g(): return S",
        **work("from house.a import f\nfrom house.b import g"),
    }


FUNCTIONS = {"house.a": "def f(): return 1\ndef g(): return 2"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (two_places(1, 2), two_places(2, 1)),
        (FUNCTIONS | work("from house.a import f, g"), FUNCTIONS | work("from house.a import f as g, g as f")),
        (work("f = abs\nf = int", "def compute(): return f()"), work("f = int\nf = abs", "def compute(): return f()")),
        (
            FUNCTIONS | work("from house.a import f\nf = f() * 2", "def compute(): return f"),
            FUNCTIONS | work("from house.a import f\nf = f() * 3", "def compute(): return f"),
        ),
        (
            FUNCTIONS | work("import house", "def compute(): return house.a.f()"),
            FUNCTIONS | work("import house", "def compute(): return house.a.f()") | {"house.__init__": "print(1)"},
        ),
        (
            work("f = 0\ndef begin():\n  global f\n  f = 1", "def compute(): return f"),
            work("f = 0\ndef begin():\n  global f\n  f = 2", "def compute(): return f"),
        ),
        (
            {"house.a": "def f(): return S", **work("from house import a\na.S = 1", "def compute(): return a.f()")},
            {"house.a": "def f(): return S", **work("from house import a\na.S = 2", "def compute(): return a.f()")},
        ),
    ],
    ids=["constants", "names", "bound in turn", "bound anew", "a package's import", "global", "of another"],
)
def test_what_a_name_stands_for_counts(first, second, tmp_path, monkeypatch):
    assert of(first, tmp_path, monkeypatch) != of(second, tmp_path, monkeypatch)


def test_where_a_definition_stands_does_not_count(tmp_path, monkeypatch):
    moved = {
        "house.c": "S = 2\ndef g(): return S",
        "house.a": "T = 3\nS = 1\ndef f(): return S",
        **work("from house import c\nfrom house.a import f\nfrom house.c import g"),
    }
    assert of(two_places(1, 2), tmp_path, monkeypatch) == of(moved, tmp_path, monkeypatch)


def test_annotations_that_change_places_do_not_count(tmp_path, monkeypatch):
    def text(first, second):
        return work("class A: pass\nclass B: pass", f"def compute(x: {first}, y: {second}): return A()")

    assert of(text("A", "B"), tmp_path, monkeypatch) == of(text("B", "A"), tmp_path, monkeypatch)


def test_the_functions_in_a_value_are_those_of_ours_wherever_they_are():
    link = glue_jax.unconstrained
    assert functions_in(link)[0] is type(link)
    assert {name_of(function) for function in functions_in(link)} >= {"glue_jax.links:_identity"}
    inner = functools.partial(lambda *_, **__: None, a=glue_jax.blend, b=glue_jax.spsa_step)
    assert functions_in(functools.partial(inner, glue_jax.ask)) == [glue_jax.ask, glue_jax.blend, glue_jax.spsa_step]
    assert functions_in(jax.nn.softmax) == functions_in("spsa") == functions_in(None) == []


def test_a_function_that_holds_values_of_the_one_around_it_is_refused(monkeypatch):
    monkeypatch.setattr(sources, "_PACKAGES", ("tests",))

    def scaled(by):
        return lambda loss: by * loss

    with pytest.raises(
        ValueError, match=r"<lambda> of tests\.experiments\.runtime\.test_sources has values .* functools\.partial"
    ):
        functions_in(scaled(2))


def test_what_is_left_out_does_not_count(tmp_path, monkeypatch):
    change = ("house.tools", "RATE * x", "RATE + x")
    without = {"leaving_out": ("house.tools:scale",)}
    assert digest_of(tmp_path, monkeypatch, [change], **without) == digest_of(tmp_path, monkeypatch, **without)


@pytest.mark.parametrize("words", [{"names": ("house.work:nothing",)}, {"leaving_out": ("house.work:nothing",)}])
def test_a_name_that_is_nowhere_is_refused(words, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'house\.work:nothing' names no definition"):
        digest_of(tmp_path, monkeypatch, **words)


def test_a_nested_function_is_what_encloses_it():
    def inner():
        pass

    assert name_of(inner) == "tests.experiments.runtime.test_sources:test_a_nested_function_is_what_encloses_it"


def test_the_constants_of_the_studies_decide_their_digests(change_source):
    before = digest(name_of(calibration._learn_calibrated))
    change_source("experiments.studies.calibration", "_IMAGES", "512", "513")
    assert digest(name_of(calibration._learn_calibrated)) != before
    of_ablation = digest("experiments.studies.ablation.trials:measure")
    change_source("experiments.studies.ablation.learners", "_LAST_RATE", "0.02", "0.03")
    assert digest("experiments.studies.ablation.trials:measure") != of_ablation


def test_a_recipes_own_functions_are_of_its_digest():
    named = {recipe.name: [name_of(function) for function in functions_in(recipe)] for recipe in recipes(TINY)}
    assert "experiments.studies.ablation.recipes:_greedy" in named["greedy soup"]
    assert "glue_jax.objectives:error_rate" in named["GLUE on accuracy"]
    assert "glue_jax.steps:spsa_step" in named["4 GLUE"]
    assert "glue_jax.links:_identity" in named["free coefficients"]
    # Of what is learned first, too.
    assert named["free coefficients, by layer"].count("glue_jax.steps:spsa_step") == 2
    for names in named.values():
        digest(*names)
