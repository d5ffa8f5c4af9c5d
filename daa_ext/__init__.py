"""Dynamic Anchor Annealing (DAA) for LLaMA-Factory.

Stage 1 estimates the gradient of general data at the base model (learning rate 0); stage 2
fine-tunes all parameters on domain data alone, that anchor in every gradient:

    anchor        g_hat = m_s / (1 - beta^s),   m_i = beta m_{i-1} + (1 - beta) g_i
    GGA   eq. 2   g_B = gamma_t g_hat + (1 - gamma_t) g_D
                  gamma_t = min(1, k0 (1 - t/T)),   k0 = daa_k0 / T
          eq. 7   s_t = |<g_D, g_hat>| / (||g_D|| ||g_hat||)
    DC    eq. 8   c_t = s_t + daa_c0
          eq. 9   theta <- theta - eta_t m / (sqrt(c_t v) + eps),  m, v: Adam moments of g_B
    AL    eq. 10  eta_t = learning_rate (1 - t/T)

    symbol   setting             where
    beta     daa_anchor_beta     estimator.MomentEstimator
    g_hat    daa_anchor (folder) artifact, lowrank.LowRank (rank <= daa_rank)
    k0       daa_k0              schedule.gamma
    gamma_t  daa_gga             blend.Blend
    s_t, c_t daa_c0, daa_dc      correction
    eta_t    learning_rate       the host's linear scheduler

Imports go one way, each floor only to floors below it (tests/test_house.py):

    maths   schedule blend correction lowrank fingerprint fragments reweight noise  ->  parts
    files   keys ranks mends stored flow_cache  ->  config manifest method_config  ->  artifact
    shares  layout gathered factorize retention  ->  zero estimator resident steered
    steps   start engine weights  ->  anchored l2_init  ->  report
    steps   checkpoint guard ds_config passes
    runs    trainer reweight_trainer osft_trainer  ->  steered_trainer anchor_trainer card_trainer
    runs    start_trainer  ->  anneal_trainer l2_trainer flow_trainer  ->  methods
    host    stages  ->  plugin
    tools   wise tasks  ->  compare newsqa  ->  cli
"""

__version__ = "0.1.0"
