"""Sections of what is done with a potential: export, CG simulation, comparison."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from openmm_hvpcg.config.base import Settings


class ExportSettings(Settings):
    """The potential file."""

    tabulate: Literal["auto", "on", "off"] = Field(
        "auto",
        description="radial filters as splines, many times as fast: auto, where their error is below 1e-5; on insists",
    )


class ExchangeSettings(Settings):
    """Replica exchange of a CG simulation with hotter copies of itself."""

    hottest_K: float = Field(
        450.0, gt=0, le=2000, description="temperatures rise from the study's to this one in equal ratios"
    )
    temperatures: int = Field(6, ge=2, description="how many, with the study's; each is one copy")
    every: int = Field(50, ge=1, description="steps between swaps")


class SimulationSettings(Settings):
    """CG molecular dynamics."""

    replicas: int = Field(32, ge=1, description="independent copies in one System; with exchange, its temperatures")
    exchange: ExchangeSettings | None = Field(None, description="off: no replica exchange in temperature")
    n_steps: int = Field(100000, ge=1)
    timestep_fs: float = Field(4.0, gt=0, le=50)
    friction_per_ps: float = Field(1.0, gt=0)
    save_every: int = Field(100, ge=1)
    trajectory_format: Literal["dcd", "xtc"] = "dcd"
    backend: Literal["auto", "torchforce", "pythonforce"] = "auto"
    priors: Literal["native", "torch"] = "native"
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    seed: int = Field(4, ge=0, le=2**31 - 1)

    @model_validator(mode="before")
    @classmethod
    def _one_copy_a_temperature(cls, content: Any) -> Any:
        exchange = content.get("exchange") if isinstance(content, dict) else None
        if isinstance(exchange, ExchangeSettings):
            exchange = exchange.model_dump()
        if not isinstance(exchange, dict) or "replicas" in content:
            return content
        n_temperatures = exchange.get("temperatures", ExchangeSettings().temperatures)
        return {**content, "replicas": n_temperatures} if isinstance(n_temperatures, int) else content

    @model_validator(mode="after")
    def _saves_something(self) -> SimulationSettings:
        if self.save_every > self.n_steps:
            raise ValueError(f"save_every ({self.save_every}) is larger than n_steps ({self.n_steps})")
        return self

    @model_validator(mode="after")
    def _exchange_fits(self) -> SimulationSettings:
        if self.exchange is None:
            return self
        if self.replicas != self.exchange.temperatures:
            raise ValueError(
                f"exchange simulates one copy at each of its {self.exchange.temperatures} temperatures: leave replicas"
                f" out, or set it to that, got {self.replicas}"
            )
        for key in ("save_every", "n_steps"):
            if getattr(self, key) % self.exchange.every:
                raise ValueError(
                    f"{key} ({getattr(self, key)}) is no multiple of exchange.every ({self.exchange.every})"
                )
        return self


class AnalysisSettings(Settings):
    """Comparison with the AA reference."""

    features: Literal["distances", "dihedrals", "distances+dihedrals"] = "distances"
    lag_frames: int = Field(10, ge=1, description="TICA lag, in frames of the reference")
    bins: int = Field(50, ge=5, description="state bins an axis along the slow modes")
    burn_in: float = Field(0.1, ge=0, lt=0.9, description="share of each CG replica left out")
    blocks: int = Field(5, ge=2, description="blocks for statistical errors")
