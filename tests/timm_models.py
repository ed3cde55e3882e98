"""The models of timm where there is no torchvision, too: they need nothing of it."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest


class Anything(type):
    """A class with any attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn(types.ModuleType):
    """A module with any class in it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder:
    """Finds torchvision, whatever it is asked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, Finder) if name.split(".")[0] == "torchvision" else None

    @staticmethod
    def create_module(spec):
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def timm_models():
    """The module timm.models; skips the test where there is no timm."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision"):
        return pytest.importorskip("timm").models
    sys.meta_path.append(Finder)
    try:
        return pytest.importorskip("timm").models
    finally:
        sys.meta_path.remove(Finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
