"""The nox sessions that the Makefile calls: environments, checks, tests, benchmarks and the demo.

``nox -s NAME -- ARGS`` runs ``python ARGS`` in the environment of a session instead of the session's own commands, for
example ``nox -s trl -- -m pytest tests/trl -k resume``.
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
from nox.command import CommandFailed

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "tests" / "constraints"
# No session needs a model hub. One thread per process is the fastest setting for models of this size.
RUN_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RUN_ENV |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
# torch reuses cached code that it compiled for another instruction set, and such code can write beyond its buffers. By
# default all runs of a user share one cache, so each instruction set gets its own folder here.
COMPILED = ROOT / ".nox" / f"inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
RUN_ENV |= {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED)}
# pytest runs in two processes. Each takes whole files, so that the fixtures of a file are built once. conftest.py sorts
# the files.
TESTS = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")

CORE_TESTS = ("tests/core", "tests/oracle", "tests/cli", "tests/packaging", "benchmarks/tests/core")

nox.options.sessions = ["environments", "lint", "core", "trl", "verl", "openrlhf", "bench_smoke"]
nox.options.default_venv_backend = "none"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sessions share. It is made once, and again if its definition or its files change.

    Attributes:
        name: name of its folder in ``.nox``.
        extras: extras of kl-plugins to install, separated by commas.
        constraints: file with the pinned versions.
        packages: further packages to install.
        locked: whether the constraints file lists all packages; they are then installed without resolution.
        sources: packages that are installed last, without dependencies, and built against the installed packages.
        build_env: environment variables of these builds.
        prepare: program that runs at the end of the installation.
    """

    name: str
    extras: str
    constraints: Path
    packages: tuple[str, ...] = ()
    locked: bool = False
    sources: tuple[str, ...] = ()
    build_env: tuple[tuple[str, str], ...] = ()
    prepare: str = ""

    @property
    def python(self) -> str:
        """Path of the interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def folder(self) -> Path:
        """Folder of the environment."""
        return ROOT / ".nox" / self.name

    def key(self) -> str:
        """Return a hash of the definition of the environment and of the files that it depends on."""
        digest = hashlib.sha256(f"{ROOT}{sys.version}{self!r}{inspect.getsource(Environment)}".encode())
        for path in (ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "constraints.txt", self.constraints):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def ensure(self, session: nox.Session) -> None:
        """Make the environment unless it exists, is complete, and is up to date."""
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
            self._pip(session, "setuptools")  # pinned here, because an isolated build would download an unpinned one
            self._pip(session, "--no-build-isolation", "-e", f".[{self.extras}]", *self.packages)
        if self.sources:
            self._pip(session, "--no-deps", "--no-build-isolation", *self.sources, env=dict(self.build_env))
        if self.prepare:
            session.run(self.python, "-c", self.prepare, external=True, env=RUN_ENV)
        stamp.write_text(key)  # written last, so that an interrupted installation leaves no stamp

    def _pip(self, session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
        pins = () if self.locked else ("-c", str(self.constraints))
        session.run(self.python, "-m", "pip", "install", *pins, *arguments, external=True, env=env)

    def run(self, session: nox.Session, *default: str) -> None:
        """Run ``python`` with the arguments of the command line, or with `default` if there are none."""
        self.ensure(session)
        session.run(self.python, *(session.posargs or default), external=True, env=RUN_ENV)


CORE = Environment("core", "test,lint,bench,report,triton", ROOT / "constraints.txt")
TRL = Environment("trl-1.16", "trl,test,bench", CONSTRAINTS / "trl-1.16.txt", ("peft",))
TRL_OLDER = [
    # TRL 1.0 imports requests but does not declare it as a requirement.
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
# The build of the documentation reads the sources without importing them, so this environment has no PyTorch.
DOCS = Environment("docs", "", ROOT / "docs" / "requirements.txt", locked=True)
# The kernel benchmark runs single files of other projects. These files do not need the dependencies of their projects.
BENCH_KERNEL = Environment(
    "bench-kernel",
    "trl,bench",
    CONSTRAINTS / "trl-1.16.txt",
    packages=("triton==3.9.0",),  # the file of veRL that is measured imports it
    sources=("liger-kernel==0.8.5", "verl==0.9.1"),
)


@nox.session
def environments(session: nox.Session) -> None:
    """Make the environments of `make test`, two at a time: while one unpacks, the other often waits for the network."""
    with ThreadPoolExecutor(2) as pool:
        # The longest installation starts first.
        for _ in pool.map(lambda environment: environment.ensure(session), (OPENRLHF, VERL, TRL, CORE)):
            pass


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff's checks, check the format, and run mypy in strict mode."""
    CORE.ensure(session)
    for command in (["-m", "ruff", "check"], ["-m", "ruff", "format", "--check"], [".ci/typecheck.py"]):
        session.run(CORE.python, *command, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation and write out/site; a broken link or a page outside the navigation is an error."""
    DOCS.run(session, "-m", "mkdocs", "build", "--strict")


@nox.session
def core(session: nox.Session) -> None:
    """Run the tests that need no host framework."""
    CORE.run(session, *TESTS, *CORE_TESTS)


@nox.session
def core_full(session: nox.Session) -> None:
    """Run the tests that need no host framework, including the slow ones."""
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
    """Test the TRL adapter, including slow tests, against several TRL versions of the supported range."""
    environment.run(session, "-m", "pytest", "--full", "tests/trl", "benchmarks/tests/trl")


@nox.session
def trl_vllm(session: nox.Session) -> None:
    """Test the TRL adapter with a real vLLM sampler on the CPU."""
    TRL_VLLM.run(session, "-m", "pytest", "--full", "tests/trl", "-m", "vllm")


@nox.session
def verl(session: nox.Session) -> None:
    """Test the veRL adapter with real workers, a real run on the CPU, two Ray nodes, and tests of veRL itself."""
    VERL.run(session, *TESTS, "tests/verl", "benchmarks/tests/verl")


@nox.session
@nox.parametrize("environment", [VERL, *VERL_OLDER], ids=["0.9.1", "0.9.0", "0.8"])
def verl_full(session: nox.Session, environment: Environment) -> None:
    """Test the veRL adapter, including all real runs, against several veRL versions of the supported range."""
    environment.run(session, "-m", "pytest", "--full", "tests/verl", "benchmarks/tests/verl")


@nox.session
def verl_megatron(session: nox.Session) -> None:
    """Test veRL's Megatron engine, with stand-ins for what needs a GPU; megatron-core stays out of the environment."""
    VERL.ensure(session)
    target = ROOT / ".nox" / "megatron"
    if not (target / "megatron").exists():
        session.run(
            VERL.python, "-m", "pip", "install", "--no-deps", "--target", str(target), "megatron-core==0.16.1",
            external=True,
        )  # fmt: skip
    VERL.run(session, "-m", "pytest", "--full", "tests/verl/test_megatron.py")


@nox.session
def verl_vllm(session: nox.Session) -> None:
    """Test the veRL adapter with veRL's own vLLM rollout on the CPU."""
    VERL_VLLM.run(session, "-m", "pytest", "--full", "tests/verl", "-m", "vllm")


@nox.session
def openrlhf(session: nox.Session) -> None:
    """Test the OpenRLHF adapter with real actors, a run with vLLM on the CPU, two Ray nodes, and tests of OpenRLHF."""
    OPENRLHF.run(session, *TESTS, "tests/openrlhf", "benchmarks/tests/openrlhf")


@nox.session
def openrlhf_full(session: nox.Session) -> None:
    """Test the OpenRLHF adapter, including all real runs."""
    OPENRLHF.run(session, "-m", "pytest", "--full", "tests/openrlhf", "benchmarks/tests/openrlhf")


TARGETS = {
    "core": (CORE, CORE_TESTS),
    "trl": (TRL, ("tests/trl", "benchmarks/tests/trl")),
    "verl": (VERL, ("tests/verl", "benchmarks/tests/verl")),
    "openrlhf": (OPENRLHF, ("tests/openrlhf", "benchmarks/tests/openrlhf")),
}
"""Environment and tests of each target whose coverage is measured."""


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests of all targets, and print the branch coverage that they have together; writes out/coverage.

    Arguments name the steps to run: targets, and ``report``, which combines the data that is there. A target that is
    run replaces its earlier data only.
    """
    failed = []
    program = ".ci/branch_coverage.py"
    for step in session.posargs or [*TARGETS, "report"]:
        if step == "report":
            CORE.ensure(session)
            session.run(CORE.python, program, "report", external=True)
            continue
        environment, tests = TARGETS[step]
        environment.ensure(session)
        shutil.rmtree(ROOT / "out" / "coverage" / step, ignore_errors=True)
        try:
            session.run(environment.python, program, "run", step, *TESTS, *tests, external=True, env=RUN_ENV)
        except CommandFailed:
            failed.append(step)  # the other targets and the report follow nevertheless
    if failed:
        session.error(f"tests failed: {', '.join(failed)}")


@nox.session
def demo(session: nox.Session) -> None:
    """Train a tiny model under five regularisers and draw the effect of each; writes out/demo."""
    TRL.run(session, "-m", "benchmarks.demo")


@nox.session
def demo_llm(session: nox.Session) -> None:
    """Train a real language model under four regularisers and show the effect of each; writes out/demo-llm."""
    TRL.run(session, "-m", "benchmarks.demo_llm")


@nox.session
def gpu_bundle(session: nox.Session) -> None:
    """Collect the files that the GPU stages need on a machine without a network; writes out/gpu-bundle."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.gpu.bundle", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_variance(session: nox.Session) -> None:
    """Measure bias and variance of each estimator's gradient against exact enumeration."""
    CORE.run(session, "-m", "benchmarks.variance")


@nox.session
def bench_staleness(session: nox.Session) -> None:
    """Show in one state why a weighted KL can diverge on stale data; writes out/bench/staleness."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.staleness", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_kernel(session: nox.Session) -> None:
    """Measure time and memory of the exact KL and of its peers; writes out/bench/kernel."""
    BENCH_KERNEL.ensure(session)
    session.run(BENCH_KERNEL.python, "-m", "benchmarks.kernel", *session.posargs, external=True, env=RUN_ENV)


@nox.session
@nox.parametrize("environment", [TRL, VERL, OPENRLHF], ids=["trl", "verl", "openrlhf"])
def bench_host_terms(session: nox.Session, environment: Environment) -> None:
    """Measure the sampled terms against each host's own expressions; writes out/bench/host_terms."""
    environment.ensure(session)
    session.run(environment.python, "-m", "benchmarks.host_terms", *session.posargs, external=True, env=RUN_ENV)


def over_hosts(session: nox.Session, name: str, *arguments: str) -> list[str]:
    """Make the environments of a benchmark that starts the interpreters of all hosts, and return its command."""
    CORE.ensure(session)
    command = [CORE.python, "-m", f"benchmarks.{name}"]
    for host, environment in (("trl", TRL), ("verl", VERL), ("openrlhf", OPENRLHF)):
        environment.ensure(session)
        command += ["--python", f"{host}={environment.python}"]
    return [*command, *arguments]


def run_in_pairs(session: nox.Session, commands: list[list[str]]) -> None:
    """Run commands two at a time and print the output of each when it has ended; a failure skips the remaining ones."""

    def run(command: list[str]) -> str:
        return session.run(*command, external=True, env=RUN_ENV, silent=True)

    with ThreadPoolExecutor(2) as pool:
        for output in pool.map(run, commands):
            print(output, flush=True)


@nox.session
def bench_hosts(session: nox.Session) -> None:
    """Compare every spec in each host with the core and with the host's own KL; writes out/bench/hosts."""
    session.run(*over_hosts(session, "hosts", *session.posargs), external=True, env=RUN_ENV)


@nox.session
def bench_overhead(session: nox.Session) -> None:
    """Time a step of each host with its own KL and with the spec of the same gradient; writes out/bench/overhead."""
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
def bench_top_k(session: nox.Session) -> None:
    """Measure the noise of exact@loss/top:<k> in a language model, by k; writes out/bench/top_k."""
    TRL.ensure(session)
    session.run(TRL.python, "-m", "benchmarks.top_k", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_report(session: nox.Session) -> None:
    """Put all results under out/bench on one page; writes out/bench/report.html."""
    CORE.ensure(session)
    session.run(CORE.python, "-m", "benchmarks.report", *session.posargs, external=True, env=RUN_ENV)


@nox.session
def bench_smoke(session: nox.Session) -> None:
    """Run benchmarks from end to end at their smallest size; writes out/bench-smoke. The numbers have no meaning."""
    smallest = (
        ("variance", CORE, ("--smoke",)),
        ("staleness", CORE, ("--smoke",)),
        ("top_k", TRL, ("--smoke",)),
        *(("host_terms", environment, ("--rounds", "3")) for environment in (TRL, VERL, OPENRLHF)),
    )
    smoke(session, ("collectives", "hosts"), smallest)


@nox.session
def bench_smoke_full(session: nox.Session) -> None:
    """Run the benchmarks that take long at their smallest size; writes out/bench-smoke. The numbers have no meaning."""
    kernel = ("kernel", BENCH_KERNEL, ("--sizes", "smoke", "--rounds", "3", "--dtypes", "float32"))
    smoke(session, ("overhead",), (("study", TRL, ("--smoke", "--fresh")), kernel))


def smoke(
    session: nox.Session, hosts: tuple[str, ...], single: tuple[tuple[str, Environment, tuple[str, ...]], ...]
) -> None:
    """Run benchmarks at their smallest size and put their results on one page.

    Args:
        session: the session.
        hosts: names of benchmarks that run in every host.
        single: name, environment and arguments of other benchmarks.
    """
    # The longest benchmarks start first, so that none of them runs alone at the end.
    commands = [over_hosts(session, name, "--smoke", "--out", f"out/bench-smoke/{name}") for name in hosts]
    for name, environment, arguments in single:
        environment.ensure(session)
        program = (environment.python, "-m", f"benchmarks.{name}")
        commands.append([*program, *arguments, "--out", f"out/bench-smoke/{name}"])
    run_in_pairs(session, commands)
    session.run(CORE.python, "-m", "benchmarks.report", "--root", "out/bench-smoke", external=True, env=RUN_ENV)
