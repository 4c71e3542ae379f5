"""Federated data sets, loaders of real ones, and partitioners that make clients of pooled data."""

from fedlens.data.digits import digits as digits
from fedlens.data.federated_data import FederatedData as FederatedData
from fedlens.data.partition import partition_by_label as partition_by_label
from fedlens.data.partition import partition_dirichlet as partition_dirichlet
from fedlens.data.partition import partition_iid as partition_iid
from fedlens.data.shakespeare import SHAKESPEARE_VOCABULARY as SHAKESPEARE_VOCABULARY
from fedlens.data.shakespeare import shakespeare as shakespeare
