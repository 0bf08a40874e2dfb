"""A page about the served model on vLLM's own server, `/precalib`, and the same as JSON.

It is a plugin of the group `vllm.endpoint_plugins`, which vLLM loads if `VLLM_PLUGINS` names it.
"""

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class PrecalibEndpoint:
    """The plugin, as vLLM's protocol `EndpointPlugin` wants it."""

    name = "precalib"
    required_tasks = ("generate",)

    def attach_router(self, app: "FastAPI") -> None:
        """Add the routes; they answer 503 until `init_state` has run."""
        from vllm_precalib.endpoint.routes import router

        app.include_router(router)

    async def init_state(
        self, engine_client: "EngineClient | None", state: "State", args: Namespace
    ) -> None:
        """Read what is shown of the model, which stays the same while the server runs."""
        from vllm_precalib.endpoint.metrics import publish
        from vllm_precalib.endpoint.routes import Limits
        from vllm_precalib.endpoint.served_model import ServedModel

        state.precalib_limits = Limits()
        state.precalib = ServedModel.of(engine_client, args)
        publish(state.precalib.report(), state.precalib.backends())
