"""A subnet as a network of its own: what export, compilation and measuring need, which take a module and no setting."""
from torch import Tensor, nn

from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet

__all__ = ['FixedSubnet']


class FixedSubnet(nn.Module):
    """Runs one subnet of a model; the weights are the model's own."""

    def __init__(self, model: SuperVisionTransformer, subnet: Subnet) -> None:
        super().__init__()
        self.model = model
        self.subnet = subnet
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] of any size."""
        return self.model(x, img_size=self.subnet.img_size, keep_rate=self.subnet.keep_rate)
