"""Thousands of virtual devices in a few processes: machines, graphs and estimators of real runs on a virtual clock.

``fedzo.simulation.simulate`` holds :func:`~fedzo.simulation.simulate.simulate`; ``settings``, ``pools``,
``process_pool`` and ``result`` what goes in and comes out.
"""
