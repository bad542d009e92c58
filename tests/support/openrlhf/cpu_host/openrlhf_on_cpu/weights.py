"""Weights from the policy to vLLM without NCCL."""


class SocketGroup:
    """What OpenRLHF uses of vLLM's NCCL communicator, on vLLM's own group of sockets."""

    def __init__(self, group, rank):
        self.group, self.rank = group, rank

    def broadcast(self, tensor, src, stream=None):
        tensor.copy_(self.group.broadcast_obj(tensor if self.rank == src else None, src))


def send_by_socket(module):
    def stateless_init_process_group(master_address, master_port, rank, world_size, device):
        from vllm.distributed.utils import StatelessProcessGroup

        return SocketGroup(StatelessProcessGroup.create(master_address, master_port, rank, world_size), rank)

    module.stateless_init_process_group = stateless_init_process_group


def load_at_once(module):
    def update_weight(self, name, dtype, shape, empty_cache=False):
        """Collect; with the last one (``empty_cache``) reload.

        On the CPU vLLM packs its weights for its own kernels, so that the host's parameter by parameter is lost.
        """
        import torch

        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        received = self.__dict__.setdefault("_received_weights", [])
        received.append((name, weight))
        if empty_cache:
            self.model_runner.reload_weights(weights_iterator=iter(received))
            received.clear()

    module.WorkerWrap.update_weight = update_weight
