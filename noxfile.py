"""The sessions behind the Makefile: environments, checks, tests and runs.

``nox -s NAME -- ARGS`` runs ``python ARGS`` in the environment of the session instead of its own commands, for example
``nox -s trl -- -m pytest tests/trl -k resume``.
"""

import hashlib
import inspect
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "tests" / "constraints"
# Nothing here needs a model hub, and one thread per process is fastest for models of this size.
RUN_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RUN_ENV |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
# Torch takes code that it compiled for one instruction set from its cache for another one too, and then the code writes
# beyond its buffers. By default all runs of a user share the cache.
COMPILED = ROOT / ".nox" / f"inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
RUN_ENV |= {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED)}
# Pytest in two processes, which take whole files, so that what the tests of a file share is made once.
# conftest.py puts the files into an order.
TESTS = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")

CORE_TESTS = ("tests/core", "tests/oracle", "tests/cli", "tests/packaging", "benchmarks/tests/core")

nox.options.sessions = ["lint", "core", "trl", "verl", "openrlhf", "bench_smoke"]
nox.options.default_venv_backend = "none"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sessions share: made once, and made anew when what it was made from changed."""

    name: str
    extras: str
    constraints: Path
    packages: tuple[str, ...] = ()
    locked: bool = False  # the constraints file is the whole list, installed without resolution
    sources: tuple[str, ...] = ()  # installed last and alone, built against what is there by then
    build_env: tuple[tuple[str, str], ...] = ()  # variables of those builds
    prepare: str = ""  # a program that ends the installation

    @property
    def python(self) -> str:
        """Path of the interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def folder(self) -> Path:
        """Where the environment lives."""
        return ROOT / ".nox" / self.name

    def key(self) -> str:
        """Hash of everything the environment is made from."""
        digest = hashlib.sha256(f"{ROOT}{sys.version}{self!r}{inspect.getsource(Environment)}".encode())
        for path in (ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "constraints.txt", self.constraints):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def ensure(self, session: nox.Session) -> None:
        """Make the environment unless a complete and current one is there."""
        stamp, key = self.folder / ".complete", self.key()
        if stamp.exists() and stamp.read_text() == key:
            return
        session.log(f"making the environment {self.name}")
        shutil.rmtree(self.folder, ignore_errors=True)
        session.run(sys.executable, "-m", "venv", str(self.folder), external=True)
        if self.locked:
            self._pip(session, "--no-deps", "-r", str(self.constraints))
            self._pip(session, "--no-deps", "--no-build-isolation", "-e", ".")
        else:
            self._pip(session, "setuptools")  # isolated builds would fetch an unpinned one
            self._pip(session, "--no-build-isolation", "-e", f".[{self.extras}]", *self.packages)
        if self.sources:
            self._pip(session, "--no-deps", "--no-build-isolation", *self.sources, env=dict(self.build_env))
        if self.prepare:
            session.run(self.python, "-c", self.prepare, external=True, env=RUN_ENV)
        stamp.write_text(key)  # last: an interrupted installation leaves none

    def _pip(self, session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
        pins = () if self.locked else ("-c", str(self.constraints))
        session.run(self.python, "-m", "pip", "install", *pins, *arguments, external=True, env=env)

    def run(self, session: nox.Session, *default: str) -> None:
        """Run ``python`` with the session's own arguments, or with `default` where there are none."""
        self.ensure(session)
        session.run(self.python, *(session.posargs or default), external=True, env=RUN_ENV)


CORE = Environment("core", "test,lint,bench,triton", ROOT / "constraints.txt")
TRL = Environment("trl-1.16", "trl,test,bench", CONSTRAINTS / "trl-1.16.txt", ("peft",))
TRL_OLDER = [
    # TRL 1.0 imports requests and does not require it.
    Environment(f"trl-{version}", "trl,test,bench", CONSTRAINTS / f"trl-{version}.txt", ("peft", "requests"))
    for version in ("1.0", "0.28")
]
TRL_VLLM = Environment("trl-vllm", "", CONSTRAINTS / "trl-vllm.txt", locked=True)
VERL = Environment("verl-0.9", "", CONSTRAINTS / "verl-0.9.txt", locked=True)
VERL_OLDER = [
    Environment(f"verl-{version}", "", CONSTRAINTS / f"verl-{version}.txt", locked=True) for version in ("0.9.0", "0.8")
]
VERL_VLLM = Environment("verl-vllm", "", CONSTRAINTS / "verl-vllm.txt", locked=True)
OPENRLHF = Environment(
    "openrlhf-0.11",
    "",
    CONSTRAINTS / "openrlhf-0.11.txt",
    locked=True,
    sources=("deepspeed==0.19.6",),
    build_env=(("DS_ACCELERATOR", "cpu"), ("DS_BUILD_OPS", "0")),
    prepare="from tests.support.openrlhf.ray_support import prepare_extensions; prepare_extensions()",
)
# Reads the sources and imports none of them: no PyTorch.
DOCS = Environment("docs", "", ROOT / "docs" / "requirements.txt", locked=True)
# Peers of the kernel benchmark run single files of theirs, which need nothing that they depend on.
BENCH_KERNEL = Environment(
    "bench-kernel",
    "trl,bench",
    CONSTRAINTS / "trl-1.16.txt",
    packages=("triton==3.9.0",),  # the file of veRL's that is measured imports it
    sources=("liger-kernel==0.8.5", "verl==0.9.1"),
)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's checks and formatting, then strict mypy."""
    CORE.ensure(session)
    for command in (["-m", "ruff", "check"], ["-m", "ruff", "format", "--check"], [".ci/typecheck.py"]):
        session.run(CORE.python, *command, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link or an unlisted page is an error; writes out/site."""
    DOCS.run(session, "-m", "mkdocs", "build", "--strict")


@nox.session
def core(session: nox.Session) -> None:
    """Test everything that needs no host framework."""
    CORE.run(session, *TESTS, *CORE_TESTS)


@nox.session
def core_full(session: nox.Session) -> None:
    """Test the same, slow tests included."""
    CORE.run(session, "-m", "pytest", "--full", *CORE_TESTS)


@nox.session
def wheel(session: nox.Session) -> None:
    """Test the core against the built wheel, without the source folders."""
    CORE.ensure(session)
    session.run(CORE.python, ".ci/from_wheel.py", *session.posargs, external=True, env=RUN_ENV)


@nox.session
@nox.parametrize("host", ["trl", "verl", "openrlhf"], ids=["trl", "verl", "openrlhf"])
def install(session: nox.Session, host: str) -> None:
    """Install a host and kl-plugins into a fresh environment, as the docs say, and run the host's examples."""
    session.run(sys.executable, ".ci/fresh_install.py", host, external=True)


@nox.session
def trl(session: nox.Session) -> None:
    """Test the TRL adapter against the newest TRL."""
    TRL.run(session, *TESTS, "tests/trl", "benchmarks/tests/trl")


@nox.session
@nox.parametrize("environment", [TRL, *TRL_OLDER], ids=["1.16", "1.0", "0.28"])
def trl_full(session: nox.Session, environment: Environment) -> None:
    """Test the TRL adapter, slow tests included, against each TRL of the supported range."""
    environment.run(session, "-m", "pytest", "--full", "tests/trl", "benchmarks/tests/trl")


@nox.session
def trl_vllm(session: nox.Session) -> None:
    """Test the TRL adapter with a real vLLM sampler on the CPU."""
    TRL_VLLM.run(session, "-m", "pytest", "--full", "tests/trl", "-m", "vllm")


@nox.session
def verl(session: nox.Session) -> None:
    """Test the veRL adapter: real workers, a real run on the CPU, two Ray nodes, veRL's own tests."""
    VERL.run(session, *TESTS, "tests/verl", "benchmarks/tests/verl")


@nox.session
@nox.parametrize("environment", [VERL, *VERL_OLDER], ids=["0.9.1", "0.9.0", "0.8"])
def verl_full(session: nox.Session, environment: Environment) -> None:
    """Test the veRL adapter, all real runs included, against each veRL of the supported range."""
    environment.run(session, "-m", "pytest", "--full", "tests/verl", "benchmarks/tests/verl")


@nox.session
def verl_vllm(session: nox.Session) -> None:
    """Test the veRL adapter with veRL's own vLLM rollout on the CPU."""
    VERL_VLLM.run(session, "-m", "pytest", "--full", "tests/verl", "-m", "vllm")


@nox.session
def openrlhf(session: nox.Session) -> None:
    """Test the OpenRLHF adapter: real actors, a real run with vLLM on the CPU, two Ray nodes, OpenRLHF's own tests."""
    OPENRLHF.run(session, *TESTS, "tests/openrlhf", "benchmarks/tests/openrlhf")


@nox.session
def openrlhf_full(session: nox.Session) -> None:
    """Test the OpenRLHF adapter, all real runs included."""
    OPENRLHF.run(session, "-m", "pytest", "--full", "tests/openrlhf", "benchmarks/tests/openrlhf")


@nox.session
def demo(session: nox.Session) -> None:
    """Train under five regularisers and draw what each of them does; writes out/demo."""
    TRL.run(session, "-m", "benchmarks.demo")


@nox.session
def demo_llm(session: nox.Session) -> None:
    """Train a real language model under four regularisers and show what each does to it; writes out/demo-llm."""
    TRL.run(session, "-m", "benchmarks.demo_llm")


@nox.session
def gpu_bundle(session: nox.Session) -> None:
    """Collect what the GPU stages need on a machine without a network; writes out/gpu-bundle."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.gpu.bundle", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_variance(session: nox.Session) -> None:
    """Measure bias and variance of each estimator's gradient against exact enumeration."""
    CORE.run(session, "-m", "benchmarks.variance")


@nox.session
def bench_staleness(session: nox.Session) -> None:
    """Show in one state why a weighted KL can run away on stale data; writes out/bench/staleness."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.staleness", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_kernel(session: nox.Session) -> None:
    """Measure the exact KL against its peers, in time and memory; writes out/bench/kernel."""
    BENCH_KERNEL.ensure(session)
    session.run(BENCH_KERNEL.python, "-m", "benchmarks.kernel", *session.posargs, external=True, env=RUN_ENV)


@nox.session
@nox.parametrize("environment", [TRL, VERL, OPENRLHF], ids=["trl", "verl", "openrlhf"])
def bench_host_terms(session: nox.Session, environment: Environment) -> None:
    """Measure sampled terms against each host's own expression; writes out/bench/host_terms."""
    environment.ensure(session)
    session.run(environment.python, "-m", "benchmarks.host_terms", *session.posargs, external=True, env=RUN_ENV)


def over_hosts(session: nox.Session, name: str, *arguments: str) -> list[str]:
    """Make the environments of a benchmark that starts the hosts' own interpreters; the command that runs it."""
    CORE.ensure(session)
    command = [CORE.python, "-m", f"benchmarks.{name}"]
    for host, environment in (("trl", TRL), ("verl", VERL), ("openrlhf", OPENRLHF)):
        environment.ensure(session)
        command += ["--python", f"{host}={environment.python}"]
    return [*command, *arguments]


def run_in_pairs(session: nox.Session, commands: list[list[str]]) -> None:
    """Run commands two at a time, and print what each said once it has ended; a failure leaves out the rest."""

    def run(command: list[str]) -> str:
        return session.run(*command, external=True, env=RUN_ENV, silent=True)

    with ThreadPoolExecutor(2) as pool:
        for output in pool.map(run, commands):
            print(output, flush=True)


@nox.session
def bench_hosts(session: nox.Session) -> None:
    """Compare what every spec does in each host with the core and with the host's own KL; writes out/bench/hosts."""
    session.run(*over_hosts(session, "hosts", *session.posargs), external=True, env=RUN_ENV)


@nox.session
def bench_overhead(session: nox.Session) -> None:
    """Time each host's step with its own KL and with the spec of the same meaning; writes out/bench/overhead."""
    session.run(*over_hosts(session, "overhead", *session.posargs), external=True, env=RUN_ENV)


@nox.session
def bench_collectives(session: nox.Session) -> None:
    """Count the collectives that the plugin adds in 1, 2 and 4 processes; writes out/bench/collectives."""
    session.run(*over_hosts(session, "collectives", *session.posargs), external=True, env=RUN_ENV)


@nox.session
def bench_study(session: nox.Session) -> None:
    """Test published claims in real RL runs, with fresh and with stale data; writes out/bench/study."""
    TRL.ensure(session)
    session.run(TRL.python, "-m", "benchmarks.study", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_report(session: nox.Session) -> None:
    """Put all results that lie under out/bench on one page, out/bench/report.html."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.report", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_smoke(session: nox.Session) -> None:
    """Run every benchmark end to end at its smallest size; writes out/bench-smoke. The numbers mean nothing."""
    smallest = (
        ("study", TRL, ("--smoke", "--fresh")),
        ("kernel", BENCH_KERNEL, ("--sizes", "smoke", "--rounds", "3", "--dtypes", "float32")),
        ("variance", CORE, ("--smoke",)),
        ("staleness", CORE, ("--smoke",)),
        *(("host_terms", environment, ("--rounds", "3")) for environment in (TRL, VERL, OPENRLHF)),
    )
    # The longest come first, so that none of them runs alone at the end.
    commands = [
        over_hosts(session, name, "--smoke", "--out", f"out/bench-smoke/{name}")
        for name in ("collectives", "overhead", "hosts")
    ]
    for name, environment, arguments in smallest:
        environment.ensure(session)
        program = (environment.python, "-m", f"benchmarks.{name}")
        commands.append([*program, *arguments, "--out", f"out/bench-smoke/{name}"])
    run_in_pairs(session, commands)
    session.run(CORE.python, "-m", "benchmarks.report", "--root", "out/bench-smoke", external=True, env=RUN_ENV)
