//! `GET /metrics`: what is counted and measured, under vLLM's names.

use std::{
    borrow::Cow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

use super::{Server, error::ApiError};
use crate::{
    engine::{Engine, EngineConfig, Status, StepTokens},
    sampling::SamplingParams,
};

/// The format of OpenMetrics, which Prometheus reads.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

// Bounds are vLLM's, and further ones below these, as small models are faster.

/// Bounds of times to a first token, in seconds.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Bounds of times between tokens, in seconds.
const NEXT_TOKEN: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
/// Bounds of times of whole requests and their parts, in seconds.
const REQUEST: [f64; 25] = [
    0.005, 0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Bounds of numbers of tokens.
const TOKENS: [f64; 17] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0,
    50_000.0, 100_000.0, 200_000.0,
];
/// Bounds of numbers of answers.
const ANSWERS: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// The words of [`Finish::reason`](crate::request::Finish::reason).
const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finished {
    finished_reason: &'static str,
}

/// How large the KV cache is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheConfig {
    block_size: u64,
    num_gpu_blocks: u64,
}

/// How many tokens steps computed, as the engine counted them.
#[derive(Clone, Debug, Default)]
struct Iterations(Arc<Mutex<StepTokens>>);

impl Iterations {
    fn set(&self, tokens: StepTokens) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = tokens;
    }
}

impl EncodeMetric for Iterations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let tokens = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bounds = StepTokens::BOUNDS.map(|bound| bound as f64).into_iter().chain([f64::MAX]);
        let buckets: Vec<_> = bounds.zip(tokens.steps().iter().copied()).collect();
        let steps = tokens.steps().iter().sum();
        encoder.encode_histogram::<NoLabelSet>(tokens.sum() as f64, steps, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// How long an answer took that has ended.
pub struct AnswerTimes {
    /// From the request to the answer's end.
    pub all: Duration,
    /// Until the engine began with it.
    pub queued: Duration,
    /// From then to its first token.
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
}

/// What is counted and measured.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    cache_usage: Gauge<f64, AtomicU64>,
    cache_config: Family<CacheConfig, Gauge>,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: Family<Finished, Counter>,
    first_token: Histogram,
    inter_token: Histogram,
    time_per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    iterations: Iterations,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
}

impl Metrics {
    /// Nothing yet, of a model of this name.
    pub fn new(model: &str) -> Self {
        let labels = [("model_name", model.to_owned()), ("engine", "0".to_owned())];
        let labels = labels.map(|(name, value)| (Cow::from(name), Cow::from(value)));
        let mut all = Registry::with_labels(labels.into_iter());
        // Those that have not happened yet are 0.
        let finished = Family::<Finished, Counter>::default();
        for finished_reason in REASONS {
            drop(finished.get_or_create(&Finished { finished_reason }));
        }
        Self {
            running: register(&mut all, "num_requests_running", "Answers that run", Gauge::default()),
            waiting: register(&mut all, "num_requests_waiting", "Answers that wait", Gauge::default()),
            cache_usage: register(
                &mut all,
                "kv_cache_usage_perc",
                "Share of the KV cache's pages that running answers hold; 1 is all",
                Gauge::default(),
            ),
            cache_config: register(
                &mut all,
                "cache_config_info",
                "Tokens of a page of the KV cache, and its pages",
                Family::default(),
            ),
            preemptions: register(
                &mut all,
                "num_preemptions",
                "Times that an answer gave its pages back",
                Counter::default(),
            ),
            prefix_queries: register(
                &mut all,
                "prefix_cache_queries",
                "Tokens of prompts that were computed or found, for each answer",
                Counter::default(),
            ),
            prefix_hits: register(
                &mut all,
                "prefix_cache_hits",
                "Those that the prefix cache, or another answer, had",
                Counter::default(),
            ),
            drafts: register(&mut all, "spec_decode_num_drafts", "Drafts", Counter::default()),
            draft_tokens: register(
                &mut all,
                "spec_decode_num_draft_tokens",
                "Tokens of drafts",
                Counter::default(),
            ),
            accepted_tokens: register(
                &mut all,
                "spec_decode_num_accepted_tokens",
                "Tokens of drafts that became part of an answer",
                Counter::default(),
            ),
            prompt_tokens: register(&mut all, "prompt_tokens", "Tokens of prompts", Counter::default()),
            generation_tokens: register(
                &mut all,
                "generation_tokens",
                "Tokens of answers",
                Counter::default(),
            ),
            success: register(&mut all, "request_success", "Answers that ended", finished),
            first_token: register(
                &mut all,
                "time_to_first_token_seconds",
                "From a request to its first token",
                Histogram::new(FIRST_TOKEN),
            ),
            inter_token: register(
                &mut all,
                "inter_token_latency_seconds",
                "From a token to the next",
                Histogram::new(NEXT_TOKEN),
            ),
            time_per_token: register(
                &mut all,
                "request_time_per_output_token_seconds",
                "The mean of that in an answer",
                Histogram::new(NEXT_TOKEN),
            ),
            end_to_end: register(
                &mut all,
                "e2e_request_latency_seconds",
                "From a request to an answer's end",
                Histogram::new(REQUEST),
            ),
            queue: register(
                &mut all,
                "request_queue_time_seconds",
                "From when the engine was given a request to when it began with an answer",
                Histogram::new(REQUEST),
            ),
            prefill: register(
                &mut all,
                "request_prefill_time_seconds",
                "From when the engine began with an answer to its first token",
                Histogram::new(REQUEST),
            ),
            inference: register(
                &mut all,
                "request_inference_time_seconds",
                "From when the engine began with an answer to its last token",
                Histogram::new(REQUEST),
            ),
            iterations: register(
                &mut all,
                "iteration_tokens_total",
                "Tokens that a step computed",
                Iterations::default(),
            ),
            decode: register(
                &mut all,
                "request_decode_time_seconds",
                "From an answer's first token to its last",
                Histogram::new(REQUEST),
            ),
            request_prompt_tokens: register(
                &mut all,
                "request_prompt_tokens",
                "Tokens of a prompt",
                Histogram::new(TOKENS),
            ),
            request_generation_tokens: register(
                &mut all,
                "request_generation_tokens",
                "Tokens of an answer",
                Histogram::new(TOKENS),
            ),
            params_n: register(
                &mut all,
                "request_params_n",
                "Answers that a request asks for",
                Histogram::new(ANSWERS),
            ),
            params_max_tokens: register(
                &mut all,
                "request_params_max_tokens",
                "The most tokens that a request asks for",
                Histogram::new(TOKENS),
            ),
            registry: all,
        }
    }

    /// A request was taken.
    pub fn asked(&self, params: &SamplingParams) {
        self.params_n.observe(params.n as f64);
        if let Some(most) = params.max_tokens {
            self.params_max_tokens.observe(most as f64);
        }
    }

    /// A request's first token came.
    pub fn first_token(&self, took: Duration) {
        self.first_token.observe(took.as_secs_f64());
    }

    /// So many further tokens of an answer came together.
    pub fn further_tokens(&self, took: Duration, tokens: usize) {
        self.inter_token.observe(took.as_secs_f64() / tokens as f64);
    }

    /// So many tokens of an answer came.
    pub fn generated(&self, tokens: usize) {
        self.generation_tokens.inc_by(tokens as u64);
    }

    /// A prompt of so many tokens was read.
    pub fn read(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.request_prompt_tokens.observe(tokens as f64);
    }

    /// An answer of so many tokens ended.
    pub fn ended(&self, reason: &'static str, tokens: usize, times: &AnswerTimes) {
        let AnswerTimes { all, queued, prefill, decode } = *times;
        self.finished(reason);
        self.request_generation_tokens.observe(tokens as f64);
        self.end_to_end.observe(all.as_secs_f64());
        self.queue.observe(queued.as_secs_f64());
        self.prefill.observe(prefill.as_secs_f64());
        self.decode.observe(decode.as_secs_f64());
        self.inference.observe((prefill + decode).as_secs_f64());
        if tokens > 1 {
            self.time_per_token.observe(decode.as_secs_f64() / (tokens - 1) as f64);
        }
    }

    /// An answer ended, or nobody wanted it any more.
    pub fn finished(&self, reason: &'static str) {
        self.success.get_or_create(&Finished { finished_reason: reason }).inc();
    }

    /// All of it as text.
    fn encode(&self, engine: Option<&Engine>) -> Result<String, std::fmt::Error> {
        if let Some(engine) = engine {
            let Status { stats, running, waiting, held_pages, step_tokens, .. } = engine.status();
            self.iterations.set(step_tokens);
            self.running.set(running as i64);
            self.waiting.set(waiting as i64);
            let EngineConfig { page_size, num_pages, .. } = *engine.config();
            self.cache_usage.set(held_pages as f64 / num_pages as f64);
            let config = CacheConfig { block_size: page_size as u64, num_gpu_blocks: num_pages as u64 };
            self.cache_config.get_or_create(&config).set(1);
            for (counter, count) in [
                (&self.preemptions, stats.preemptions),
                (&self.prefix_queries, stats.read + stats.saved),
                (&self.prefix_hits, stats.saved),
                (&self.drafts, stats.drafts),
                (&self.draft_tokens, stats.drafted),
                (&self.accepted_tokens, stats.accepted),
            ] {
                counter.inner().store(count as u64, Ordering::Relaxed);
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Registers a metric under vLLM's prefix.
fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(format!("vllm:{name}"), help, metric.clone());
    metric
}

/// What is counted and measured, in the format of OpenMetrics.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, description = "Metrics", body = String, content_type = "application/openmetrics-text"))
)]
pub async fn metrics(State(server): State<Arc<Server>>) -> Result<Response, ApiError> {
    let text = server.metrics.encode(server.llm.get().map(crate::Llm::engine)).map_err(|error| {
        tracing::error!(%error, "the metrics cannot be written");
        ApiError::internal()
    })?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
