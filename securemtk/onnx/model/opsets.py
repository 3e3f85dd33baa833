"""Which version of each operator set a model means."""

from onnx import ModelProto


def opset_of(model: ModelProto) -> int:
    """Return the version of the default domain, 0 when the model names none.

    A model may name several, as converters of scikit-learn do: as in onnxruntime the last one counts.
    """
    return next((x.version for x in reversed(model.opset_import) if x.domain in ("", "ai.onnx")), 0)


def settle_opsets(model: ModelProto) -> None:
    """Write the default domain as "", and leave one version of each domain, the last one."""
    for owner in (model, *model.functions):
        versions = {"" if x.domain == "ai.onnx" else x.domain: x.version for x in owner.opset_import}
        # Where each domain is named first, so that the order stays what it was.
        if len(versions) < len(owner.opset_import):
            del owner.opset_import[len(versions) :]
        for entry, (domain, version) in zip(owner.opset_import, versions.items(), strict=True):
            entry.domain, entry.version = domain, version
