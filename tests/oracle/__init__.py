"""Exact enumeration against autograd of the exact objective: is the promised gradient the one that is estimated?

Constructions in the literature, the spec that expresses each, and where it is checked (RTG: reward-to-go).

| construction                                | spec                                               | test_*.py  |
|---------------------------------------------|----------------------------------------------------|------------|
| k1 in reward, RTG                           | k1@reward, k1@advantage, k2@loss/horizon:sequence  | targets    |
| k1 in reward, own token only                | k1@advantage/horizon:token                         | targets    |
| k1 as loss                                  | k1@loss/allow:biased                               | wrong      |
| k2 as loss per token; k3+                   | k2@loss; k3+@loss                                  | targets    |
| k3 as loss per token                        | k3@loss                                            | targets    |
| k2, k3 in reward                            | k2@reward, k3@reward (allow:biased)                | wrong      |
| k3 in reward plus k3 as loss                | k1@advantage/future:k3                             | targets    |
| any f-divergence, per token and along RTG   | jsd@loss, jsd@loss/horizon:sequence, ...           | targets    |
| no correction, off-policy                   | k2@loss, k3@loss on stale data                     | targets    |
| token weight x k2, live ratio x k3          | k2@loss/is:token                                   | targets, id. |
| prefix weight x k2                          | k2@loss/is:prefix                                  | targets    |
| per-decision, live k3                       | k2@loss/horizon:sequence/future:k3/is:decision     | targets, id. |
| per-decision, k1 or any f                   | .../horizon:sequence/is:decision                   | targets, id. |
| sequence weight x RTG                       | k2@loss/horizon:sequence/is:sequence               | targets    |
| token or prefix weight x RTG                | .../horizon:sequence/is:token (allow:biased)       | wrong      |
| truncated or clipped weight                 | k2@loss/is:token/cap:2, /band:, /clip:             | truncation |
| weight with a floor, and where it does harm | k2@loss/is:token/floor:0.5                         | floor      |
| log-ratio frozen at the sampler, in reward  | k1@reward from the sampler's log-probs             | wrong      |
| live ratio x k2                             | none; shown against k2@loss/is:token               | identities |
| squared sum of u, k3 of the whole sequence  | none: there is no joint-ratio estimator            |            |
| geometric-mean sequence ratio               | none: it is not an importance weight               |            |
| exact local KL and future; exact, off-policy | exact@loss/horizon:sequence, .../is:decision       | targets    |

Exact terms are given the enumerated KL of each state; `expectation.full_vocabulary_kl` is where a kernel's goes in.
"""
