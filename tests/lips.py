"Lips that the tests of both lip encoders look at."

import torch


def batch(T=9, short=5):
    "Two clips of lips, the second shorter, with rubbish in its padding."
    lips, mask = torch.randn(2, 1, T, 88, 88), torch.arange(T)[None] < torch.tensor([[T], [short]])
    lips[1, :, short:] = 50.0
    return lips, mask
