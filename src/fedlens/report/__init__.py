"""What a run shows: progress while it goes on, tables and one picture afterwards."""

from fedlens.report.clients import ClientComparison as ClientComparison
from fedlens.report.clients import compare_clients as compare_clients
from fedlens.report.clients import last_local_models as last_local_models
from fedlens.report.overview import draw_overview as draw_overview
from fedlens.report.overview import save_overview as save_overview
from fedlens.report.progress import ProgressDisplay as ProgressDisplay
from fedlens.report.progress import RoundReport as RoundReport
