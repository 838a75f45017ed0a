"""Serve an artifact directory: a Ray Serve application in its task's protocol, on loopback unless told otherwise.

Two deployments: the ingress (raytx/ingress.py) speaks HTTP, replicas (raytx/replica.py) hold the model.
"""

# No `from __future__ import annotations`: Ray Serve reads the annotation of build_app's argument as a class.

import json
import logging
import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, ControllerOptions, HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from raytx import artifact, cluster
from raytx.admission import RETRY_AFTER_S
from raytx.artifact import Artifact
from raytx.errors import ArtifactError, RecipeError, ResourceError, did_you_mean
from raytx.ingress import REPLICA, Ingress
from raytx.plan import check_plugins
from raytx.protocols import PROTOCOLS, Description, is_loopback, key_digest
from raytx.registry import registry
from raytx.replica import Replica
from raytx.sections import Serving
from raytx.storage import is_uri

APP = "raytx"
API_KEY = "RAYTX_API_KEY"
"""Environment variable that holds the token clients must send."""
SLACK = 32
"""Requests the ingress holds beyond those the replicas have room for, so that it can refuse them itself."""
HEALTH_PERIOD_S = 2
HEALTH_TIMEOUT_S = 4
"""A process that does not say in time that it is healthy, three times in a row, is replaced (Ray's own: 30 s)."""
PROXY_SLACK_S = 5
"""Seconds by which Serve's proxy is more patient than the ingress, which says in JSON what was too late."""
CONTROLLER = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # Serve would wait 20 s for a stopped process to say goodbye
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(HEALTH_PERIOD_S),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(HEALTH_TIMEOUT_S),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raytx.front.middlewares",
}
"""Environment of Serve's controller, which its proxy inherits."""
DRAIN_PERIOD_S = 0.2
"""Pause between looks at whether a stopping replica has answered its last request."""


class ServeArgs(Serving):
    """What `build_app` takes, from Python or from a Serve config file."""

    directory: str
    """Artifact: a directory that every node with a replica sees under this path, or a URI, fetched by each of them."""


def serve(
    directory: str | Path,
    *,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
    verbose: bool = False,
    block: bool = True,
    **overrides: Any,
) -> str:
    """Serve an artifact until Ctrl-C or SIGTERM (or, with block=False, go on serving) and return its URL.

    Overrides are fields of `Serving`. Raises ArtifactError, RecipeError or ResourceError, before Ray starts if it can.
    """
    args = _arguments(directory, {"host": host, "port": port} | overrides)
    app = build_app(args)
    _check_port(args.host, args.port)
    with _signals() as wait, _connected(address, verbose=verbose) as session:
        _check_cluster(args)
        session.callback(_end_app)
        _start(app, args, verbose=verbose)
        print(_banner(args), flush=True)
        if not block:
            session.pop_all()
            return _url(args)
        wait()
        print("stopping", flush=True)
    return _url(args)


def build_app(args: ServeArgs) -> Application:
    """Check an artifact and its settings; return the application, for `serve.run` or a Serve config file.

    In a config file: `import_path: raytx.serve:build_app`, `args: {directory: ..., num_replicas: 2}`. The token is read
    from RAYTX_API_KEY in the environment in which this runs.
    """
    found = artifact.read(args.directory)
    _check_settings(args)
    key = os.environ.get(API_KEY)
    replica = ray_serve.deployment(Replica).options(**_replica_options(args))
    ingress = ray_serve.deployment(ray_serve.ingress()(Ingress)).options(**_ingress_options(args))
    app: Application = ingress.bind(
        replica.bind(args.directory, args),
        description=_describe(found, args.directory),
        protocol=_protocol_of(found),
        settings=args,
        key_digest=key_digest(key) if key else None,
    )
    return app


def _replica_options(args: ServeArgs) -> dict[str, Any]:
    actor = {"num_cpus": args.cpus_per_replica, "runtime_env": {"env_vars": _environment(args)}}
    # Nothing waits in Ray's router, which would ask a full replica again after ever longer pauses while its model
    # stands idle. The ingress bounds what is inside; all of it may be inside the only replica left.
    room = args.num_replicas * args.max_ongoing_requests + args.max_queued_requests
    return {
        "name": REPLICA,
        "num_replicas": args.num_replicas,
        "max_ongoing_requests": room,
        "max_queued_requests": room,
        "ray_actor_options": actor | ({"num_gpus": 1} if args.use_gpu else {}),
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": DRAIN_PERIOD_S,
        "max_constructor_retry_count": 2,
    }


def _ingress_options(args: ServeArgs) -> dict[str, Any]:
    room = args.num_replicas * args.max_ongoing_requests + args.max_queued_requests + SLACK
    return {
        "name": "Ingress",
        "max_ongoing_requests": room,
        "max_queued_requests": room,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": DRAIN_PERIOD_S,
    }


def _environment(args: ServeArgs) -> dict[str, str]:
    """Return the variables of a replica; torch takes its number of threads from OMP_NUM_THREADS."""
    return {"OMP_NUM_THREADS": str(args.cpus_per_replica)} | cluster.passed_on()


def _describe(found: Artifact, directory: str) -> Description:
    published = (artifact.located(directory) / artifact.MANIFEST).stat().st_mtime
    labels = None if found.labels is None else tuple(found.labels)
    return Description(found.name, found.task, found.exporter["type"], labels, int(published))


def _protocol_of(found: Artifact) -> str:
    """Return the protocol an artifact's task speaks; raise PluginError when a plugin it needs is not here."""
    check_plugins(found.plugins)
    model: Any = registry().parse("model", found.model)
    return str(model.task_class().protocol)


# ----------------------------------------------------------------------------------- checks before Ray is started


def _arguments(directory: str | Path, given: dict[str, Any]) -> ServeArgs:
    """Join what is given here with what the artifact's recipe wanted; the former wins."""
    values = {key: value for key, value in given.items() if value is not None}
    place = str(directory) if is_uri(str(directory)) else str(Path(directory).expanduser().absolute())
    wanted = artifact.read(place, verify=False).serving
    try:
        return ServeArgs.model_validate(wanted | values | {"directory": place})
    except ValidationError as error:
        raise RecipeError("; ".join(map(_mistake, error.errors()))) from None


def _mistake(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"serving.{key}: unknown key.{did_you_mean(key, Serving.model_fields)}"
    return f"serving.{key}: {problem['msg']}, not {problem['input']!r}"


def _check_settings(args: ServeArgs) -> None:
    if not is_loopback(args.host) and not os.environ.get(API_KEY):
        raise RecipeError(
            f"serving.host={args.host} can be reached from other machines: set {API_KEY} to a token that clients must "
            "send, or serve on 127.0.0.1"
        )
    if args.max_batch_size > args.max_ongoing_requests:
        raise RecipeError(
            f"serving.max_batch_size={args.max_batch_size} is more than serving.max_ongoing_requests="
            f"{args.max_ongoing_requests}, so a batch could never fill; raise the one or lower the other"
        )


def _check_port(host: str, port: int) -> None:
    """Raise ResourceError when the port cannot be had. Ray itself would share a port with another Ray Serve."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(place)
    except OSError as error:
        raise ResourceError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}. Stop what uses it, or choose another "
            "with --port (serving.port)"
        ) from None


# ------------------------------------------------------------------------------------------------ start and stop


def _check_cluster(args: ServeArgs) -> None:
    """Raise ResourceError when Serve is there already, with options of its own, or the replicas can never fit."""
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise ResourceError(
            "Ray Serve is already running on this cluster. Add the artifact to it with a Serve config file "
            "(import_path: raytx.serve:build_app), or stop it with `serve shutdown`"
        )
    one = {"CPU": float(args.cpus_per_replica)} | ({"GPU": 1.0} if args.use_gpu else {})
    room = cluster.groups(one, num_workers=1, driver={}, nodes=cluster.free())
    if room < args.num_replicas and cluster.started_here():
        each = ", ".join(f"{name}: {amount:g}" for name, amount in one.items())
        raise ResourceError(
            f"serving.num_replicas={args.num_replicas} x {{{each}}} do not fit: this machine has room for {room}"
        )


def _start(app: Application, args: ServeArgs, *, verbose: bool) -> None:
    """Start Ray Serve and the application; return when it answers."""
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # The ingress has its own deadline and says so in JSON; Ray's is for what never reaches it.
    options = HTTPOptions(host=args.host, port=args.port, request_timeout_s=args.timeout_s + PROXY_SLACK_S)
    quiet = LoggingConfig(log_level="INFO" if verbose else "WARNING", enable_access_log=verbose)
    ray_serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=options,
        logging_config=quiet,
        controller_options=ControllerOptions(runtime_env={"env_vars": CONTROLLER}),
    )
    try:
        ray_serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ArtifactError(f"the replica could not start: {_failure()}") from error


def _failure() -> str:
    """Return the line that names the error in the traceback that a replica left with the controller."""
    deployments = ray_serve.status().applications[APP].deployments.values()
    lines = [line.strip() for deployment in deployments for line in deployment.message.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("raytx.errors.")]
    return str((ours or lines)[-1])


@contextmanager
def _connected(address: str | None, *, verbose: bool) -> Iterator[ExitStack]:
    """Connect to Ray; yield what is to be undone in the end, the connection too where it was made here."""
    with ExitStack() as session:
        if not ray.is_initialized():
            session.callback(ray.shutdown)
        cluster.connect(address, verbose=verbose)
        yield session


def _end_app() -> None:
    """Let running requests finish, then end the application and Serve with it.

    A supervisor may have sent its SIGTERM to Ray's processes as well. Ray would wait a minute for a dead cluster and
    then end this process with an error; so the wait is in a thread, and over when the cluster is gone.
    """
    # A cluster of our own ends with this process. Shutting Serve down on it would only print Ray's farewells.
    end = partial(ray_serve.delete, APP) if cluster.started_here() else ray_serve.shutdown
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    address = ray.get_runtime_context().gcs_address
    while ending.is_alive() and _answers(address):
        ending.join(DRAIN_PERIOD_S)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Yield a function that waits for Ctrl-C or SIGTERM. Until the context ends, a second Ctrl-C interrupts the stop.

    A second SIGTERM changes nothing: supervisors send one to the process and one to its group. Only the main thread may
    take signals; elsewhere the function waits for ever.
    """
    stop = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    def wait() -> None:
        for number in before if main else ():  # not before: ray.init takes SIGTERM for itself
            signal.signal(number, handle)
        stop.wait()

    try:
        yield wait
    finally:
        for number, handler in before.items() if stop.is_set() else ():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------- what is said


def _url(args: ServeArgs) -> str:
    """Return the address to type: a server that listens everywhere is asked on loopback."""
    host = "127.0.0.1" if args.host in {"0.0.0.0", "::"} else args.host
    return f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"


def _banner(args: ServeArgs) -> str:
    """Say what is served, where, and one command that asks it."""
    found = artifact.read(args.directory, verify=False)
    path, body = PROTOCOLS[_protocol_of(found)].example(_describe(found, args.directory))
    key = f' -H "Authorization: Bearer ${API_KEY}"' if os.environ.get(API_KEY) else ""
    curl = f"curl {_url(args)}{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"serving {found.name} ({found.task}) on {_url(args)}, described on {_url(args)}/docs\n{curl}"
