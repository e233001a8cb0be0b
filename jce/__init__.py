from jce._binary import binary_cross_entropy as binary_cross_entropy
from jce._binary import binary_entropy as binary_entropy
from jce._binary import binary_kl_divergence as binary_kl_divergence
from jce._cross_entropy import cross_entropy as cross_entropy
from jce._entropy import entropy as entropy
from jce._kl_divergence import generalized_kl_divergence as generalized_kl_divergence
from jce._kl_divergence import kl_divergence as kl_divergence
