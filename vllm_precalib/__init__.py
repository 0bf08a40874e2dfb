"""The vLLM plugin: serves precalib checkpoints, chosen by their config.json."""


def register() -> None:
    """Entry point of `vllm.general_plugins`; vLLM calls it once in every process.

    It does not raise: the plugin is loaded for every model served from this environment, and an
    exception here would take down those that have nothing to do with precalib.
    """
    import logging

    from precalib_kernels.errors import ServingError
    from vllm_precalib.compat import version_warning

    logger = logging.getLogger("vllm.precalib")  # vLLM's handlers serve names below "vllm"
    if warning := version_warning():
        logger.warning(warning)
    try:
        from vllm_precalib.config import register_config
    except ServingError as error:
        logger.error("precalib checkpoints cannot be served: %s", error)
    else:
        register_config()
