"""Do gathers see the latest writes? `torchrun race_worker.py` on GPUs; it also runs on CPUs, where nothing can race."""

import tiny
import torch

from zoscale.config import ModelConfig
from zoscale.data.batch import MicroBatch
from zoscale.engine import ZeroOrderEngine
from zoscale.models.loading import load_model, read_model_config
from zoscale.runtime import Runtime, start, stop

_CYCLES = 2 * 10**9  # about a second


def main() -> None:
    config = ModelConfig(config=tiny.ARCHITECTURES["opt"], dtype="float32")
    accelerator = start(Runtime(dtype=config.dtype))
    torch.manual_seed(0)
    engine = ZeroOrderEngine(load_model(config, read_model_config(config)), accelerator=accelerator)
    batch = MicroBatch.from_labels(tiny.batch(0)[0]).to(engine.mesh.device)
    is_cuda = engine.mesh.device.type == "cuda"

    @torch.no_grad()
    def answers() -> torch.Tensor:
        return engine.answers.answer_logprobs(batch).clone()

    for _ in range(3):  # from the second pass on, ZeRO-3 gathers ahead
        before = answers()
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(_CYCLES)
        for shard in engine.shards:
            shard.live.mul_(0.9)
        early = answers()
        if is_cuda:
            torch.cuda.synchronize()
        late = answers()
        assert torch.equal(early, late), "a gather read a shard before it was written"
        assert not torch.equal(before, late)
    stop()


if __name__ == "__main__":
    main()
