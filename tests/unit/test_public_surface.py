from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import version

import pytest

import posthoc_ema
import posthoc_ema.torch

SURFACES = [posthoc_ema, posthoc_ema.torch]


def public_names(module):
    """Names that a module shows: no submodules, nothing private."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@pytest.mark.parametrize("module", SURFACES, ids=lambda m: m.__name__)
def test_all_is_sorted_and_complete(module):
    names = set(module.__all__) - {"__version__"}
    assert names == public_names(module)
    constants = [n for n in module.__all__ if n.isupper()]
    classes = [n for n in module.__all__ if n[0].isupper() and not n.isupper()]
    rest = [n for n in module.__all__ if not n[0].isupper()]
    assert module.__all__ == [*sorted(constants), *sorted(classes), *sorted(rest)]


def described(module):
    """Everything a user can reach by a public name, methods included."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            for method, member in vars(value).items():
                function = member.fget if isinstance(member, property) else member
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


DESCRIBED = [pair for module in SURFACES for pair in described(module)]


@pytest.mark.parametrize(("name", "value"), DESCRIBED, ids=[name for name, _ in DESCRIBED])
def test_public_thing_has_a_docstring_of_its_own(name, value):
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what dataclass writes by itself


FUNCTIONS = [(n, v) for n, v in DESCRIBED if inspect.isfunction(v) and "." not in n]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])
def test_public_function_documents_its_arguments_and_is_annotated(name, function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    documented = set(re.findall(r"^        \**`?(\w+)`?:", function.__doc__, re.MULTILINE))
    assert set(signature.parameters) <= documented


def test_names_of_the_contract_are_there():
    """The names that do not change between versions."""
    for name in (
        *("gamma_from_sigma_rel", "sigma_rel_from_gamma", "power_beta", "PowerProfile"),
        *("PointProfile", "fit", "SnapshotStore", "synthesize"),
    ):
        assert name in posthoc_ema.__all__
    torch_side = ["Tracker", "recalibrate_batchnorm", "swap_in", "swapped", "track"]
    assert posthoc_ema.torch.__all__ == torch_side
    profile = posthoc_ema.PowerProfile
    result = posthoc_ema.fit([profile(t=9, sigma_rel=0.1)], [profile(t=9, sigma_rel=0.2)])
    assert result.coefficients.shape == (1, 1)
    assert result.residual.shape == (1,)


def test_version_is_that_of_the_distribution():
    assert posthoc_ema.__version__ == version("posthoc-ema")


def test_package_says_that_it_is_typed():
    assert importlib.resources.files("posthoc_ema").joinpath("py.typed").is_file()
