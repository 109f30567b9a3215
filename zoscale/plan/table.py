"""The plan of a run as a table and a line of advice."""

from typing import Any

from zoscale.devices import GIB


def table(report: dict[str, Any]) -> str:
    """The plan that `make_plan` gives, as text."""
    job, columns = report["job"], (report["zero_order"], report["first_order"])
    names = list(dict.fromkeys(name for column in columns for name in column["memory"]))
    ours = f"zero-order, {report['quantization']}" if report["quantization"] else "zero-order"
    rows = [["memory of a rank, GiB", ours, "AdamW, ZeRO-3"]]
    rows.append(["  ranks per copy of the model", *(str(column["shard_size"]) for column in columns)])
    for name in names:
        rows.append([f"  {name}", *(_gib(column["memory"].get(name)) for column in columns)])
    if report["host"]:
        host = sum(report["host"].values())
        rows.append([f"  (offloaded to {job['offload']}; in the host's memory)", _gib(host), "-"])
    rows.append([f"  in all, of {report['budget'] / GIB:.1f}", *(_gib(column["total"]) for column in columns)])
    rows.append(["  highest in", *(column["phase"] for column in columns)])
    rows.append(["  fits", *("yes" if column["fits"] else "NO" for column in columns)])
    rows.append(["one step of a rank, at peak rates", "", ""])
    rows.append(["  gathered, GB", *(f"{column['work']['gathered'] / 1e9:.3f}" for column in columns)])
    rows.append(["  over the link, GB", *(f"{column['work']['received'] / 1e9:.3f}" for column in columns)])
    if job["offload"] != "none":
        rows.append(["  uploaded, GB", *(f"{column['work']['uploaded'] / 1e9:.3f}" for column in columns)])
    rows.append(["  TFLOP", *(f"{column['work']['flops'] / 1e12:.3f}" for column in columns)])
    for name in ("compute", "memory", "link"):
        rows.append([f"  {name}, ms", *(f"{column['seconds'][name] * 1e3:.3f}" for column in columns)])
    rows.append(["  bound by", *(column["bound"] for column in columns)])
    if "timed" in report:
        rows += _timed_rows(report["timed"])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    body = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    way = f"{job['together']} in a pass"
    head = (
        f"{report['model']}: {report['parameters']:,} parameters, {report['dtype']}; trainable: "
        f"{report['trainable']:,}; {job['ranks']} ranks, batch {job['batch']} x {job['tokens']} tokens, "
        f"{job['candidates']} candidates, {way}"
    )
    advice = _advice(report)
    return "\n".join([head, "", *body, "", advice])


def _timed_rows(timed: dict[str, Any]) -> list[list[str]]:
    columns = timed.get("zero_order"), timed.get("first_order")
    together = "one rank" if timed["ranks"] == 1 else f"{timed['ranks']} ranks together"
    rows = [[f"one step of a rank, as timed here ({timed['device']}, {together})", "", ""]]
    for name, title in (("losses", "losses"), ("update", "update"), ("link", "link, as given"), ("step", "in all")):
        values = [column and column[name] for column in columns]
        if any(value is not None for value in values):
            rows.append([f"  {title}, ms", *("-" if value is None else f"{1e3 * value:.3f}" for value in values)])
    return rows


def _advice(report: dict[str, Any]) -> str:
    zero_order = report["zero_order"]
    if not zero_order["fits"]:
        more = "" if report["quantization"] else "more GPUs, "
        return f"does not fit: {more}fewer rows (forward.max_rows, data.micro_batch_size) or a smaller model"
    ranks, size = report["job"]["ranks"], zero_order["shard_size"]
    if report["job"]["offload"] != "none":
        return f"leave mesh.shard_size as it is: {size} of {ranks} ranks share a copy, offloaded"
    if size == ranks:
        return f"set mesh.shard_size={size} (or leave it: all ranks hold the model together)"
    return f"set mesh.shard_size={size}: {ranks // size} replicas, which exchange scalars only"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.3f}"
