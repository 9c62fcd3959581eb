"""A question about every picture of a folder, by actors of Ray Data. Needs `ray[data]`."""

import ray
from ray.data import ActorPoolStrategy

from sparsevlm.ray import SparseVLMPredictor
from sparsevlm.scenes import draw_scene

for seed in range(8, 12):  # in the place of a folder of your own
    draw_scene(seed).image.save(f"scene-{seed}.png")

# On a cluster ray.init() without arguments.
ray.init(num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
pictures = ray.data.read_binary_files(".", include_paths=True, file_extensions=["png"])  # columns: bytes, path
answers = pictures.repartition(target_num_rows_per_block=2).map_batches(
    SparseVLMPredictor,
    fn_constructor_kwargs={
        "model": "bundled",  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
        "pruning": {"keep": 0.25},
        "generation": {"max_new_tokens": 24},
        "image_column": "bytes",
        "question": "List all cards.",
    },
    batch_format="pyarrow",
    batch_size=2,
    compute=ActorPoolStrategy(size=2),
    num_cpus=1,  # on GPUs num_gpus=1
)
answers.drop_columns(["bytes"]).write_parquet("answers")

for row in ray.data.read_parquet("answers").sort("path").take_all():
    name = row["path"].rpartition("/")[2]
    print(f"{name}: {row['answer']} ({row['kept_tokens']:.0f} of {row['visual_tokens']} visual tokens)")
ray.shutdown()
