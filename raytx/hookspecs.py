"""The five hooks a plugin may implement. Each returns the config classes that the plugin provides.

A plugin is an installed package with an entry point in the group "raytx":

    [project.entry-points.raytx]
    my_plugin = "my_plugin"

    # my_plugin/__init__.py
    from raytx import hookimpl
    RAYTX_API = 1

    @hookimpl
    def raytx_model():
        return [MyModelConfig]
"""

from __future__ import annotations

import pluggy

from raytx.components import CompressionConfig, DataConfig, ExportConfig, ModelConfig, StrategyConfig

API_VERSION = 1
"""Version of hooks and protocols. A plugin module states the one it was written for as RAYTX_API."""

hookspec = pluggy.HookspecMarker("raytx")
hookimpl = pluggy.HookimplMarker("raytx")


@hookspec
def raytx_model() -> list[type[ModelConfig]]:  # type: ignore[empty-body]
    """Return the model components of this plugin."""


@hookspec
def raytx_data() -> list[type[DataConfig]]:  # type: ignore[empty-body]
    """Return the data components of this plugin."""


@hookspec
def raytx_strategy() -> list[type[StrategyConfig]]:  # type: ignore[empty-body]
    """Return the strategy components of this plugin."""


@hookspec
def raytx_compression() -> list[type[CompressionConfig]]:  # type: ignore[empty-body]
    """Return the compression components of this plugin."""


@hookspec
def raytx_export() -> list[type[ExportConfig]]:  # type: ignore[empty-body]
    """Return the export components of this plugin."""
