"""Serve a quantized checkpoint and check all that a deployment relies on; see deploy/smoke.sh."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import checks
from checks import CheckError
from openai import OpenAIError

from offline_quantize.benchmark.server import Server, ServerError

SECONDS = float(os.environ.get("SMOKE_SECONDS", "300"))  # to become ready


def main() -> None:
    """Run all checks; exit code 1 with the reason and the end of the server's log if one fails."""
    if len(sys.argv) < 2:
        sys.exit("usage: deploy/smoke.sh DIRECTORY [flags for vllm serve]")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        server = Server("smoke", model, log, *flags, VLLM_COMPUTE_NANS_IN_LOGITS="1")
        try:
            check(server)
        except (CheckError, OpenAIError, OSError) as error:
            sys.exit(f"smoke: FAILED: {server.error(f'failed: {error}')}")
        except ServerError as error:
            sys.exit(f"smoke: FAILED: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            server.stop()
    print("smoke: ok")


def check(server: Server) -> None:
    """All checks, a line for each."""
    say(f"waiting for {server.url}/health")
    server.wait_until_ready(SECONDS)
    before = checks.metrics(server)
    try:
        text = checks.equal_completions(server)
    except CheckError:
        checks.check_canary(checks.metrics(server))  # says more, if it is the reason
        raise
    say(f"completion, twice the same: {text!r}")
    say(f"streamed, the same in {checks.streamed_completion(server, text)} pieces")
    answer = checks.chat(server)
    say("no chat: the model has no chat template" if answer is None else f"chat: {answer!r}")
    after = checks.metrics(server)
    say(f"metrics: {checks.check_metrics(before, after)}")
    checks.check_canary(after)
    say("no NaN in the logits")
    say(f"SIGTERM: {checks.stop_in_flight(server)}")


def say(text: str) -> None:
    print(f"smoke: {text}", flush=True)


if __name__ == "__main__":
    main()
