"""Credentials stay with the process that has them."""

from __future__ import annotations


def keep_credentials_here() -> None:
    """Stop Ray Tune from sending this process's AWS keys to its trials, to be called before a `Tuner` is made.

    It does so by their runtime environment, which Ray writes into its log (`runtime_env_agent.log`) as it stands. A
    trial finds credentials as every process does: by boto3's chain on its own machine.
    """
    from ray.tune.execution import class_cache

    kept = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE = kept
