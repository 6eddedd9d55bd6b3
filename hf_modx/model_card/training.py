"""What the card says of how a model was trained: phases, settings, data and environment."""

from collections.abc import Mapping
from enum import Enum
from typing import Any
from urllib.parse import quote

from ..callbacks.modx import distils_replayed_alone
from ..markdown import escaped, table
from .metadata import source_of_test


def record_of_phase(results: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    return results["training"][number - 1] or {}


def recipe_in_words(results: Mapping[str, Any], number: int) -> str:
    """Its name, and what was changed on the way: after a rollback a run may go on with other settings."""
    changed = [
        f"Other settings held up to phase {entry['until_phase']}: {escaped('; '.join(entry['changes']))}."
        for entry in results.get("changed_settings", [])
        if entry["until_phase"] < number
    ]
    return " ".join([f"Recipe {escaped(results['recipe'])}.", *changed])


def phases_table(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    rows = []
    for k, phase in enumerate(identity["phases"][:number], start=1):
        record = record_of_phase(results, k)
        rows.append(
            [
                str(k),
                escaped(phase["name"]),
                f"{record.get('pairs', phase['rows']):,}",
                str(record.get("steps", "")),
                f"phase-{record['starts_from']}" if "starts_from" in record else "",
                *(
                    f"{100 * record[kept]['mean']:.1f} %" if kept in record else ""
                    for kept in ("image_rows_kept", "text_rows_kept")
                ),
                " to ".join(f"{value:.4g}" for value in record.get("logit_scale", [])),
                wall_time(record),
                _energy(record),
                escaped(record.get("weights", "")),
            ]
        )
    of = ", of replayed" if distils_replayed_alone(identity["recipe_args"].get("ModX", {})) else ""
    header = ["phase", "name", "pairs", "steps", "starts from", f"image rows kept{of}", f"text rows kept{of}"]
    return table([*header, "logit scale", "time", "energy of the GPUs", "weights after it"], rows)


def wall_time(record: Mapping[str, Any]) -> str:
    """Of a phase that was interrupted the log only knows the time since it went on."""
    seconds = record.get("train_runtime")
    if seconds is None:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            text = f"{seconds / size:.1f} {unit}"
            break
    else:
        text = f"{seconds:.1f} s"
    return f"{text} from step {record['resumed_at_step']} on" if "resumed_at_step" in record else text


def _energy(record: Mapping[str, Any]) -> str:
    """In kilowatt-hours; of a phase that was interrupted, as the time."""
    joules = record.get("train_energy_joules")
    return "" if joules is None else f"{joules / 3.6e6:.2g} kWh"


def options_table(recipe_args: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (escaped(callback), escaped(name), _value(value))
        for callback, options in recipe_args.items()
        for name, value in options.items()
    ]
    return table(["loss callback", "option", "value"], rows)


def settings_table(settings: Mapping[str, Any]) -> str:
    rows = [(escaped(name), _value(value)) for name, value in settings.items() if value is not None]
    return table(["hyper-parameter", "value"], rows)


def _value(value: Any) -> str:
    return escaped(value.value if isinstance(value, Enum) else value)


def data_table(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    sources, phases = results.get("sources", {}), identity["phases"]
    base = next((name for name in sources if name not in {phase["name"] for phase in phases}), None)
    rows = []
    if base is not None:
        rows.append(_data_row("base", base, sources[base], identity["base"]))
    for k, phase in enumerate(phases[:number], start=1):
        source = {"rows": phase["rows"], **sources.get(phase["name"], {})}
        rows.append(_data_row(f"phase {k}", phase["name"], source, phase["data"]))
    for test, pairs in results["test_pairs"].items():
        source = {"rows": pairs, **source_of_test(results, test)}
        rows.append(_data_row("test", test, source, identity["tests"].get(test)))
    return table(["used as", "name", "pairs", "fingerprint", "data set", "licence"], rows)


def _data_row(used_as: str, name: str, source: Mapping[str, Any], fingerprint: str | None) -> list[str]:
    rows = f"{source['rows']:,}" if "rows" in source else ""
    licence = escaped(source.get("licence") or "")
    return [used_as, escaped(name), rows, escaped(fingerprint or ""), dataset_link(source), licence]


def data_notes(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> str:
    learned = [phase["name"] for phase in identity["phases"][:number]]
    later = [phase["name"] for phase in identity["phases"][number:]]
    sources = {name: source for name, source in results.get("sources", {}).items() if name not in later}
    described = [(escaped(name), escaped(source.get("description") or "")) for name, source in sources.items()]
    notes = [table(["name", "description"], [row for row in described if row[1]])]
    silent = [name for name in learned if not sources.get(name, {}).get("licence")]
    if silent:
        notes.append(f"The data state no licence: {', '.join(map(escaped, silent))}.")
    not_learned = [f"{name} (train)" for name in later]
    bad_samples = {name: bad for name, bad in results.get("bad_samples", {}).items() if name not in not_learned}
    left_out = [f"{bad['count']} of {escaped(name)}" for name, bad in bad_samples.items()]
    if left_out:
        notes.append(f"Rows left out as bad samples: {', '.join(left_out)}.")
    if deleted := results.get("deleted_pairs"):
        notes.append(_deletions(deleted))
    return "\n\n".join(note for note in notes if note)


def _deletions(deleted: Mapping[str, int]) -> str:
    asked = [f"{deleted[kind]} {kind.replace('_', ' ')}" for kind in ("pair_ids", "images") if deleted[kind]]
    known = deleted["trained_before"]
    earlier = f" The models of phases 1 to {known} were trained before some of this was asked." if known else ""
    return (
        f"Deleted on request, from the replay memory ({deleted['rows_from_memory']} rows) and from what this phase "
        f"was trained on: {' and '.join(asked)}.{earlier} What a model has learned before may remain in it."
    )


def environment_table(known: Mapping[str, Any]) -> str:
    rows = [(escaped(name), escaped(value)) for name, value in known.get("versions", {}).items()]
    rows += [(key, escaped(known[key])) for key in ("device", "processes") if key in known]
    return table(["used", "version or name"], rows)


def dataset_link(source: Mapping[str, Any]) -> str:
    if "dataset_id" not in source:
        return escaped(source.get("homepage", ""))
    link = f"[{escaped(source['dataset_id'])}](https://huggingface.co/datasets/{quote(source['dataset_id'])})"
    details = [f"{key} {escaped(source[key])}" for key in ("config", "split", "revision") if key in source]
    return ", ".join([link, *details])
