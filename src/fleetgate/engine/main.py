"""`fleetgate engine`: a simulated inference server, or with `--llamacpp` a real one, with the OpenAI protocol."""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvloop

from fleetgate.engine.batch import Speeds
from fleetgate.engine.llamacpp import EngineUnavailable, serve_llamacpp
from fleetgate.engine.request_parser import OutputDefaults
from fleetgate.engine.server import Connection, EngineConfig, EngineServer

_BACKLOG = 4096

_EXAMPLES = """
examples:
  fleetgate engine --model llama-3.3-70b --slots 64 --region eu-west
  fleetgate engine --prefill-tokens-per-s 15000 --decode-base-s 0.028 --decode-per-sequence-s 0.00035
  fleetgate engine --prefill-tokens-per-s 0 --decode-base-s 0        responds at once, for load tests
  fleetgate engine --llamacpp smollm2                                a real model on this machine's processor

The first line of output has the address it listens on. It serves POST /v1/chat/completions, /v1/completions,
/v1/embeddings and /v1/responses, and GET /v1/models, /health and /metrics.
"""


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number that is not negative")
    return value


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError("must be HOST:PORT, for example 127.0.0.1:0")
    return host.strip("[]"), int(port)


def parser() -> argparse.ArgumentParser:
    """The command line of `fleetgate engine`."""
    engine_parser = argparse.ArgumentParser(
        prog="fleetgate engine",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = engine_parser.add_argument
    add("--listen", type=_address, default=("127.0.0.1", 8000), metavar="HOST:PORT", help="0 picks a free port")
    add("--model", action="append", metavar="NAME", help="a model it serves; may be given several times (sim)")
    add("--region", default="", help="sent in the response header x-engine-region")
    add("--style", choices=("vllm", "llamacpp"), default="vllm", help="the format of metrics and refusals (vllm)")
    add("--slots", type=_positive, default=32, help="responses generated at once; others queue (32)")
    add(
        "--queue-max",
        type=_count,
        default=1024,
        help="waiting requests; beyond it 429 in style vllm, 503 in llamacpp (1024)",
    )
    add("--prefill-tokens-per-s", type=_seconds, default=8000.0, help="0: at once (8000)")
    add("--decode-base-s", type=_seconds, default=0.02, help="a step takes base + per sequence x batch (0.02)")
    add("--decode-per-sequence-s", type=_seconds, default=0.0, help="(0)")
    add("--decode-tokens-per-s", type=_seconds, help="instead of the two above; 0: at once")
    add("--output-tokens", type=_positive, default=64, help="length of a response if the client sets no limit (64)")
    add("--kv-tokens", type=_positive, default=400_000, help="size of the KV cache, for its gauge (400000)")
    add("--latency-s", type=_seconds, default=0.0, help="round trip added to every request (0)")
    add("--startup-s", type=_seconds, default=0.0, help="time after the start during which it responds 503 (0)")
    add("--api-key", default="", help="refuse other keys with 401")
    add("--seed", type=int, default=0, help="selects the generated text (0)")
    add("--llamacpp", metavar="GGUF", help="run a real llama.cpp server on this file, or on smollm2")
    return engine_parser


def _config(options: argparse.Namespace) -> EngineConfig:
    base_s, per_sequence_s = options.decode_base_s, options.decode_per_sequence_s
    if options.decode_tokens_per_s is not None:
        base_s, per_sequence_s = (1 / options.decode_tokens_per_s if options.decode_tokens_per_s else 0.0), 0.0
    return EngineConfig(
        models=tuple(options.model or ("sim",)),
        speeds=Speeds(
            prefill_tokens_per_s=options.prefill_tokens_per_s,
            decode_base_s=base_s,
            decode_per_sequence_s=per_sequence_s,
        ),
        defaults=OutputDefaults(seed=options.seed, output_tokens=options.output_tokens),
        slots=options.slots,
        queue_max=options.queue_max,
        style=options.style,
        region=options.region,
        latency_s=options.latency_s,
        startup_s=options.startup_s,
        kv_tokens=options.kv_tokens,
        api_key=options.api_key,
    )


def _base_url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


async def _serve(config: EngineConfig, bound: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    engine = EngineServer(config, loop)
    server = await loop.create_server(lambda: Connection(engine), sock=bound, backlog=_BACKLOG)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    sys.stdout.write(f"listening on {_base_url(bound)}\n")
    sys.stdout.flush()
    await stopped.wait()
    server.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises: `OSError` if the address is not available."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or "127.0.0.1", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def main(arguments: Sequence[str]) -> int:
    """Run an engine until a signal; returns the exit code."""
    options = parser().parse_args(arguments)
    host, port = options.listen
    try:
        with bind(host, port) as bound:
            if options.llamacpp is None:
                uvloop.run(_serve(_config(options), bound))
                return 0
            host, port = bound.getsockname()[:2]
        return serve_llamacpp(options.llamacpp, host, port, options.slots, tuple(options.model or ()))
    except EngineUnavailable as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        sys.stderr.write(f"cannot listen on {host}:{port}: {reason}; choose another --listen\n")
    return 1
