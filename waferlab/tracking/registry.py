"""The versions of a registered model, and which of them is champion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waferlab.errors import RegistryError
from waferlab.tracking.line import Line, in_a_line

if TYPE_CHECKING:
    from waferlab.tracking.runs import Run

OVERTAKEN = " But meanwhile another model became champion, which this one was not compared with: so it is challenger."


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        version: its number.
        aliases: that name it.
        tags: that it has had from the start.
        is_whole: whoever registered it came to the end of that.
    """

    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    is_whole: bool = True


@dataclass(frozen=True)
class Champion:
    """The champion among the versions of a model.

    Attributes:
        version: its number.
        folder: with its files, if they could be had.
        problem: why not, or "".
    """

    version: str
    folder: Path
    problem: str = ""


def answered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever calls the method waits until it is carried out, after all before it, and gets the answer."""

    @wraps(method)
    def ask(self: ModelRegistry, *arguments: Any, **named: Any) -> Any:
        return self._ask(partial(method, self, *arguments, **named))

    return ask


class ModelRegistry(Line):
    """MLflow's model registry; every question is answered, or raises RegistryError."""

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            found = None if self.broken else self._result(self._later(question, ""), patient=True)
        except Exception as error:  # this one cannot be had; the rest goes on
            raise RegistryError(in_a_line(error)) from error
        if self.broken:
            raise RegistryError("MLflow could not be used; a warning said why")
        return found

    @answered
    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first; none if there is no such model.

        Raises:
            RegistryError: the registry cannot be asked.
        """
        return self._versions(name)

    def _versions(self, name: str) -> list[ModelVersion]:
        aliases = self._aliases(name)
        if aliases is None:
            return []
        named: dict[str, list[str]] = {}
        for alias, version in aliases.items():
            named.setdefault(version, []).append(alias)
        found, page = [], None
        while page is None or page.token:  # MLflow gives so many at a time
            page = self._client.search_model_versions(f"name='{name}'", page_token=page and page.token)
            found += [
                ModelVersion(
                    str(v.version), aliases := tuple(named.get(str(v.version), ())), dict(v.tags),
                    bool(v.description or aliases),
                )
                for v in page
            ]  # fmt: skip
        return sorted(found, key=lambda one: int(one.version))

    @answered
    def champion(self, name: str, *, into: Path) -> Champion | None:
        """The version that `models:/name@champion` names; None if the registry says that there is none.

        Args:
            name: of the registered model.
            into: an empty folder, to which the version's files are copied.

        Raises:
            RegistryError: the registry cannot be asked, so nobody knows whether there is a champion.
        """
        from mlflow.artifacts import download_artifacts

        version = (self._aliases(name) or {}).get("champion")
        if version is None:
            return None
        try:
            with as_the_programs_own(self.uri):
                download_artifacts(f"models:/{name}/{version}", dst_path=str(into), tracking_uri=self.uri)
        except Exception as error:  # whatever a disk, a server or a store in the cloud does
            if may_pass(error):
                raise
            return Champion(version, into, in_a_line(error))
        return Champion(version, into)

    def _aliases(self, name: str) -> dict[str, str] | None:
        """The version of each alias of a model; None only if the store says that it has no such model."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self._client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise  # a store that is down or refuses does not say that there is no champion
        return {alias: str(version) for alias, version in aliases.items()}

    @answered
    def register(
        self, run: Run, file: Path, *, name: str, about: str, alias: str, description: str, tags: Mapping[str, str],
        beside: Sequence[Path], example: Any, classes: int, instead_of: str | None,
    ) -> tuple[str, str, str]:  # fmt: skip
        """Registers an ONNX file as the next version of a model, under an alias.

        Args:
            run: that the file comes from; it must be open.
            file: to register.
            name: of the registered model.
            about: what it does, in Markdown, for its page.
            alias: "champion" or "challenger".
            description: of the version, in Markdown.
            tags: of the version.
            beside: files that the version keeps in its folder `extra_files`.
            example: input, uint8 [N, rows, columns].
            classes: columns of the output.
            instead_of: the version that was champion when it was judged. Where another is by now, as another run's may
                be, this one is challenger.

        Returns:
            The version, its alias and its description.

        Raises:
            RegistryError: the registry cannot be used, or refused.
        """
        # An earlier try may have come so far: its version has had these tags from the start.
        version = next((one.version for one in self._versions(name) if tags and one.tags == tags), None)
        if version is None:
            with as_the_programs_own(self.uri):
                model = _log_model(run, file, beside, example, classes)
                if self._aliases(name) is None:
                    self._client.create_registered_model(name)
                about_it = {"run_id": run.id, "tags": dict(tags), "model_id": model.model_id}
                version = str(self._client.create_model_version(name, model.model_uri, **about_it).version)
        self._client.update_registered_model(name, description=about)
        if alias == "champion" and (self._aliases(name) or {}).get("champion") not in (None, instead_of, version):
            alias, description = "challenger", description + OVERTAKEN
        self._client.set_registered_model_alias(name, alias, version)
        self._client.update_model_version(name, version, description=description)  # last: who has one is whole
        return version, alias, description


def _log_model(run: Run, file: Path, beside: Sequence[Path], example: Any, classes: int) -> Any:
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    with mlflow.start_run(run_id=run.id):
        return mlflow.onnx.log_model(
            onnx.load(file),
            name="model",
            signature=ModelSignature(
                Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1), "maps")]),
                Schema([TensorSpec(np.dtype("float32"), (-1, classes), "probabilities")]),
            ),
            input_example={"maps": np.asarray(example, dtype=np.uint8)},
            pip_requirements=["mlflow", "onnx", "onnxruntime"],  # inferring them takes ten seconds
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
            extra_files=[str(one) for one in beside],
        )


@contextmanager
def as_the_programs_own(uri: str) -> Iterator[None]:
    """Where MLflow looks models up is one address for the whole program, which may have its own before and after."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def may_pass(error: Exception) -> bool:
    """Whether a later try may succeed: no connection, HTTP 429 or 5xx, a database that is locked or has no room."""
    if not hasattr(error, "get_http_status_code"):  # not MLflow's own
        return isinstance(error, ConnectionError | TimeoutError)
    status = error.get_http_status_code()
    if status == 500:  # what a server says; but MLflow gives it to callers' mistakes as well
        return hasattr(error, "json") or str(error).startswith("API request")
    return status == 429 or status > 500
