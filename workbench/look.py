"""The style sheet of what desks show: for JupyterLab, for exported pages, for reports. Nothing in it is fetched."""

from __future__ import annotations

DESK_STYLE = """
.workbench-panes { display: flex; flex-wrap: wrap; gap: 12px; margin: 6px 0; }
.workbench-pane { flex: 1 1 230px; border: 1px solid #bbb; border-radius: 6px; padding: 6px 10px; min-width: 0; }
.workbench-pane h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; }
.workbench-pane pre { white-space: pre-wrap; overflow-wrap: break-word; word-break: normal; margin: 0; padding: 0;
  font-size: 13px; line-height: 1.45; border: 0; background: transparent; color: inherit; }
.workbench-facts { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 6px 0; padding: 0; list-style: none; }
.workbench-facts li { margin: 0; } .workbench-facts b { font-variant-numeric: tabular-nums; }
.workbench-words { margin: 6px 0; padding-left: 10px; border-left: 3px solid #E69F00; }
.workbench-code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 6px 0; }
"""
