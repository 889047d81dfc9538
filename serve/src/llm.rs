//! A model that is loaded and answers: the engine, its text, and where it runs.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use flashinfer_rs::kv::PageAllocator;

use crate::{
    Result,
    backend::{
        StepCapacity,
        device::{self, Device, Loaded},
        gpu::{self, GpuOptions},
        parallel,
        precision::Precision,
    },
    engine::{End, Engine, EngineConfig, Events, Models, SHUTDOWN_TIMEOUT},
    group::{Group, Launched, Parallel, Settings, end_process, end_soon},
    hub::Hub,
    model::Model,
    request::{Finish, Request},
    sampling::SamplingParams,
    scheduler::{DraftModel, Limits, Token},
    text::{ChatOptions, Message, Text},
};

/// Tokens of a page of the KV cache.
const PAGE_SIZE: usize = 16;
/// The most tokens that one step computes on the CPU, unless it is said.
const CPU_STEP_TOKENS: usize = 256;
/// The same on a GPU.
const GPU_STEP_TOKENS: usize = 2048;
/// The most tokens of a step that reads prompts beside answers, unless it is said: about where an H200 is
/// as fast for each token as with more.
const CHUNK_TOKENS: usize = 512;

/// The most tokens of a model's drafts, unless it is said.
const DRAFT_TOKENS: usize = 4;

/// How a model is run.
#[derive(Clone, Debug)]
pub struct LlmOptions {
    /// Where.
    pub device: Device,
    /// Tokens that the KV cache holds, of all requests that run.
    pub cache_tokens: usize,
    /// The most tokens that one step computes, so that longer prompts are read in parts;
    /// `None` for 2048 on a GPU and 256 on the CPU.
    pub step_tokens: Option<usize>,
    /// The most tokens of a step that reads prompts beside answers that go on: with fewer their tokens
    /// come more evenly, and prompts take longer.
    pub chunk_tokens: usize,
    /// The most answers that run at a time.
    pub max_running: usize,
    /// The most answers that run or wait at a time.
    pub max_queued: usize,
    /// The most tokens of their prompts.
    pub max_queued_tokens: usize,
    /// The most tokens of an answer that are guessed; those that are right are kept. `None` for 4 if
    /// there is a draft model, and 0 if not.
    pub draft: Option<usize>,
    /// The files of a model that guesses them, in place of what was said before. It has the same
    /// vocabulary, and a KV cache of its own for [`cache_tokens`](Self::cache_tokens) tokens, where the other
    /// model is.
    pub draft_model: Option<Vec<PathBuf>>,
    /// Whether an answer is the same, token by token, alone, in any batch, with drafts
    /// and after preemption. It costs time on a GPU; the CPU's answers always are.
    pub deterministic: bool,
    /// The type of weights on a GPU, as in [`GpuOptions::weights`].
    pub weights: Precision,
    /// The type of the KV cache on a GPU, as in [`GpuOptions::kv`].
    pub kv: Precision,
    /// The processes that compute the model together, one for each GPU; `None` for this one. When one
    /// of them fails, all [end](end_process).
    pub parallel: Option<Parallel>,
    /// How long the graphs of a GPU's steps are captured before the first request, the smallest
    /// first, and then as long those of a draft model. Others are captured when they are needed,
    /// which the requests of that step wait for; `None` for all.
    pub graphs_within: Option<Duration>,
}

impl Default for LlmOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            cache_tokens: 8192,
            step_tokens: None,
            chunk_tokens: CHUNK_TOKENS,
            max_running: 256,
            max_queued: 1024,
            max_queued_tokens: 1 << 22,
            draft: None,
            draft_model: None,
            deterministic: false,
            weights: Precision::Auto,
            kv: Precision::Auto,
            parallel: None,
            graphs_within: None,
        }
    }
}

impl LlmOptions {
    /// What a GPU's steps are limited to.
    fn limits(&self, model: &Model, text: &Text) -> Limits {
        Limits {
            step_tokens: self.step_tokens.unwrap_or(GPU_STEP_TOKENS),
            chunk_tokens: self.chunk_tokens.max(1),
            max_running: self.max_running,
            context: model.config.context_length,
            draft: self.draft_tokens(),
            ends: text.ends().clone(),
        }
    }

    /// The most tokens of a draft.
    pub(crate) fn draft_tokens(&self) -> usize {
        self.draft.unwrap_or(if self.draft_model.is_some() { DRAFT_TOKENS } else { 0 })
    }

    /// Pages of the KV cache.
    fn num_pages(&self) -> usize {
        self.cache_tokens.div_ceil(PAGE_SIZE)
    }

    fn gpu(&self, capacity: StepCapacity) -> GpuOptions {
        GpuOptions {
            ordinal: self.parallel.as_ref().map_or(0, Parallel::local_rank),
            deterministic: self.deterministic,
            weights: self.weights,
            kv: self.kv,
            ..GpuOptions::new(capacity.tokens)
        }
    }

    /// What the ranks of a group have to have in common.
    fn settings(&self, model: &Model, device: Device) -> Settings {
        let Self { cache_tokens, step_tokens, max_running, deterministic, weights, kv, .. } = self;
        BTreeMap::from([
            ("the model".into(), model.digest()),
            ("where it computes (--device)".into(), format!("{device:?}").to_lowercase()),
            ("--cache-tokens".into(), cache_tokens.to_string()),
            ("the most tokens of a step".into(), format!("{step_tokens:?}")),
            ("--max-running".into(), max_running.to_string()),
            ("--speculate".into(), self.draft_tokens().to_string()),
            ("--deterministic".into(), deterministic.to_string()),
            ("--weights".into(), format!("{weights:?}").to_lowercase()),
            ("--kv".into(), format!("{kv:?}").to_lowercase()),
        ])
    }
}

/// A model, or the part of it that a rank computes, and where.
struct RankModel {
    model: Model,
    device: Device,
    group: Option<Arc<Group>>,
    launched: Option<Launched>,
}

impl RankModel {
    /// Meets the others, if there are any.
    fn meet(model: Model, options: &LlmOptions) -> Result<Self> {
        let Some(parallel) = &options.parallel else {
            return Ok(Self { model, device: options.device, group: None, launched: None });
        };
        let device = device::of_ranks(options.device, parallel)?;
        // What cannot be divided is known before others wait.
        let settings = options.settings(&model, device);
        let model = model.divide(parallel.rank())?;
        let (group, launched) = parallel.meet(settings, end_process)?;
        Ok(Self { model, device, group: Some(group), launched })
    }
}

/// An answer that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Its text.
    pub text: String,
    /// Its tokens, but for one that ended it.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub end: End,
}

/// A language model, ready to answer.
///
/// Its chat template is a program that comes with the model. Where that is not trusted, call
/// `text::sandbox::init` first in `main`.
///
/// ```no_run
/// use flashinfer_serve::{Llm, SamplingParams};
///
/// let llm = Llm::open("smollm2")?;
/// let params = SamplingParams { temperature: 0.8, max_tokens: Some(64), ..SamplingParams::default() };
/// for answer in llm.generate("The capital of France is", &params)? {
///     println!("{}", answer.text);
/// }
/// # Ok::<(), flashinfer_serve::Error>(())
/// ```
pub struct Llm {
    engine: Engine,
    place: String,
    group: Option<Arc<Group>>,
    /// After the engine, which tells them that this is over.
    _launched: Option<Launched>,
}

impl Llm {
    /// Loads a model by its name or the path of its file, on a GPU if there is one.
    ///
    /// # Errors
    /// There is no such model, its file is not one that can be run, or it cannot be
    /// loaded.
    pub fn open(model: &str) -> Result<Self> {
        Self::load(&Hub::from_env()?.locate(&model.parse()?)?, &LlmOptions::default())
    }

    /// Loads a model from its files, in the order of its parts.
    ///
    /// # Errors
    /// The file is not one that can be run, or the model cannot be loaded.
    pub fn load(files: &[PathBuf], options: &LlmOptions) -> Result<Self> {
        let model = Model::open_files(files)?;
        let text = Arc::new(Text::from_gguf(&model.content)?);
        let files = options.draft_model.as_ref().filter(|_| options.draft_tokens() > 0);
        let draft_model = files.map(|files| open_draft(files, &model, &text)).transpose()?;
        let config = EngineConfig {
            limits: options.limits(&model, &text),
            page_size: PAGE_SIZE,
            num_pages: options.num_pages(),
            max_queued: options.max_queued,
            max_queued_tokens: options.max_queued_tokens,
            shutdown_timeout: SHUTDOWN_TIMEOUT,
        };
        let RankModel { model, device, group, launched } = RankModel::meet(model, options)?;
        let place = Arc::new(OnceLock::new());
        let (set, of_thread, of_engine) = (place.clone(), options.clone(), group.clone());
        let engine = Engine::start(config, text, move |pool, limits| {
            let LlmOptions { step_tokens, graphs_within, .. } = of_thread;
            let capacity = limits.step_capacity();
            let (gpu, group) = (of_thread.gpu(capacity), of_engine.as_ref());
            let loaded = device::load(device, &model, pool, capacity, gpu, graphs_within, group);
            let Loaded { backend, on_gpu, place } =
                loaded.inspect_err(|error| device::say_failed(group, error))?;
            if !on_gpu && step_tokens.is_none() {
                limits.step_tokens = CPU_STEP_TOKENS;
            }
            let device = match device {
                Device::Auto if on_gpu => Device::Gpu,
                Device::Auto => Device::Cpu,
                asked => asked,
            };
            let draft = draft_model
                .map(|model| load_draft(&model, device, pool, limits, graphs_within))
                .transpose()?;
            let _ = set.set(place);
            Ok(Models::from(backend).with_draft(draft))
        })?;
        let place = place.get().cloned().unwrap_or_default();
        Ok(Self { engine, place, group, _launched: launched })
    }

    /// Computes a part of a model, as one of the ranks of [`LlmOptions::parallel`] beside the first,
    /// until that one is done. `met` is called when all ranks are there.
    ///
    /// # Errors
    /// As for [`load`](Self::load); those of `met`; or the ranks fail.
    pub fn follow(files: &[PathBuf], options: &LlmOptions, met: impl FnOnce() -> Result<()>) -> Result<()> {
        let model = Model::open_files(files)?;
        let text = Text::from_gguf(&model.content)?;
        let capacity = options.limits(&model, &text).step_capacity();
        let RankModel { model, device, group, .. } = RankModel::meet(model, options)?;
        let group = group.ok_or("this process is alone; expected a rank of several")?;
        let follow = || -> Result<()> {
            met()?;
            let pool = PageAllocator::new(options.num_pages(), PAGE_SIZE)?;
            let gpu = options.gpu(capacity);
            let mut loaded = device::load(device, &model, &pool, capacity, gpu, None, Some(&group))?;
            parallel::follow(&mut *loaded.backend, &pool, &group)?;
            end_soon();
            Ok(())
        };
        follow().inspect_err(|error| device::say_failed(Some(&group), error))
    }

    /// An engine that was started otherwise.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_engine(engine: Engine) -> Self {
        Self { engine, place: String::new(), group: None, _launched: None }
    }

    /// Tells the other ranks, if there are any, that this is over, and has the process end within seconds.
    /// Dropping it does so, too, once its last answer's step is computed.
    pub(crate) fn end_ranks(&self) {
        if let Some(group) = &self.group {
            // Rank 0 waits for nothing.
            let _ = group.end();
            end_soon();
        }
    }

    /// Where the model runs, and why there.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The engine, to which any number of requests can be given at a time.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The model's tokenizer.
    pub fn text(&self) -> &Arc<Text> {
        self.engine.text()
    }

    /// Has the model continue a text: [`n`](SamplingParams::n) times.
    ///
    /// # Errors
    /// The request cannot be answered; a parameter is out of its range; or an answer
    /// failed.
    pub fn generate(&self, prompt: &str, params: &SamplingParams) -> Result<Vec<Completion>> {
        complete(self.stream(prompt, params)?)
    }

    /// Has the model answer a chat, as its template writes it: [`n`](SamplingParams::n) times.
    ///
    /// ```no_run
    /// use flashinfer_serve::{
    ///     Llm, SamplingParams,
    ///     text::{Message, Role},
    /// };
    ///
    /// let llm = Llm::open("smollm2")?;
    /// let mut chat = vec![
    ///     Message::new(Role::System, "Be brief."),
    ///     Message::new(Role::User, "What is the capital of France?"),
    /// ];
    /// let answer = llm.chat(&chat, &SamplingParams::default())?.remove(0);
    /// chat.push(Message::new(Role::Assistant, answer.text));
    /// # Ok::<(), flashinfer_serve::Error>(())
    /// ```
    ///
    /// # Errors
    /// The template does not take the messages; and as [`generate`](Self::generate).
    pub fn chat(&self, messages: &[Message], params: &SamplingParams) -> Result<Vec<Completion>> {
        let prompt = self.text().render_chat(messages, &[], &ChatOptions::default())?;
        complete(self.engine.submit(Request::new(prompt, params.clone()))?)
    }

    /// As [`generate`](Self::generate), while the answers come.
    ///
    /// ```no_run
    /// # use flashinfer_serve::{Llm, SamplingParams};
    /// # let llm = Llm::open("smollm2")?;
    /// for event in llm.stream("Once upon a time", &SamplingParams::default())? {
    ///     print!("{}", event.text);
    /// }
    /// # Ok::<(), flashinfer_serve::Error>(())
    /// ```
    ///
    /// # Errors
    /// The request cannot be answered, or a parameter is out of its range.
    pub fn stream(&self, prompt: &str, params: &SamplingParams) -> Result<Events> {
        let prompt = self.text().encode(prompt);
        Ok(self.engine.submit(Request::new(prompt, params.clone()))?)
    }
}

/// Opens a model that is to draft for another.
///
/// # Errors
/// Its file is not one that can be run, or its tokens are others.
fn open_draft(files: &[PathBuf], model: &Model, text: &Text) -> Result<Model> {
    let draft = Model::open_files(files)?;
    let (ours, theirs) = (model.config.vocab_size, draft.config.vocab_size);
    let sizes =
        || (ours != theirs).then(|| format!("its network has {theirs} tokens, and the model's {ours}"));
    match text.difference(&Text::from_gguf(&draft.content)?).or_else(sizes) {
        None => Ok(draft),
        Some(difference) => Err(format!(
            "the draft model has another vocabulary: {difference}; expected a model of the same family"
        )
        .into()),
    }
}

/// Loads a model that drafts, with as many pages as the other one has.
///
/// # Errors
/// It does not fit beside the other model, or a tensor cannot be read.
fn load_draft(
    model: &Model,
    device: Device,
    pool: &PageAllocator,
    limits: &Limits,
    graphs_within: Option<Duration>,
) -> Result<DraftModel> {
    let pool = PageAllocator::new(pool.num_pages(), pool.page_size())?;
    let capacity = limits.step_capacity();
    let gpu = GpuOptions::new(capacity.tokens);
    let loaded = device::load(device, model, &pool, capacity, gpu, graphs_within, None);
    let Loaded { backend, on_gpu, .. } =
        loaded.map_err(|error| format!("the draft model cannot be loaded beside the model: {error}"))?;
    let draft = DraftModel::new(backend, &pool, limits.step_tokens, model.config.context_length);
    // Those are graphs, which are captured for as many rows.
    Ok(if on_gpu { draft.with_few_tokens(capacity.outputs.min(gpu::MOST_ROWS)) } else { draft })
}

/// The answers to a request, once all of them have ended.
///
/// # Errors
/// One of them failed.
pub fn complete(events: Events) -> Result<Vec<Completion>> {
    let mut open: Vec<(String, Vec<Token>)> = Vec::new();
    let mut ended: Vec<(usize, Completion)> = Vec::new();
    for event in events {
        if open.len() <= event.choice {
            open.resize_with(event.choice + 1, Default::default);
        }
        let (text, tokens) = &mut open[event.choice];
        text.push_str(&event.text);
        tokens.extend(event.tokens);
        let Some(end) = event.end else { continue };
        if let Finish::NoNumbers | Finish::Failed(_) = end.finish {
            return Err(format!("the answer was ended by {}", end.finish).into());
        }
        let completion = Completion { text: std::mem::take(text), tokens: std::mem::take(tokens), end };
        ended.push((event.choice, completion));
    }
    ended.sort_by_key(|(choice, _)| *choice);
    Ok(ended.into_iter().map(|(_, completion)| completion).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::{
        sampling::InvalidParameter,
        tests::{bytes, forward},
    };

    /// A small model with random weights.
    fn llm(options: &LlmOptions) -> Llm {
        let folder = tempfile::tempdir().unwrap();
        let mut tiny = forward::BIASES.file();
        bytes::add_tokenizer(&mut tiny, "gpt-2", forward::BIASES.vocab);
        Llm::load(&[tiny.write(&folder)], &LlmOptions { device: Device::Cpu, ..options.clone() }).unwrap()
    }

    #[test]
    fn a_model_continues_a_text() {
        let llm = llm(&LlmOptions::default());
        assert_eq!(llm.place(), "on the CPU (as asked)");
        assert_eq!(llm.engine().status().stats.steps, 0);
        let greedy = SamplingParams { max_tokens: Some(6), ignore_eos: true, ..SamplingParams::default() };
        let alone = llm.generate("ok the", &greedy).unwrap();
        assert_eq!((alone.len(), alone[0].tokens.len()), (1, 6));
        assert_eq!(alone[0].end.finish, Finish::MaxTokens);
        // The second forks the first, within a page.
        let both = llm.generate("ok the", &SamplingParams { n: 2, ..greedy.clone() }).unwrap();
        assert!(both.iter().all(|one| one.tokens == alone[0].tokens));
        assert_eq!(llm.engine().status().stats.saved, 1);
        // Several at a time, drawn ones among them, and again.
        let drawn =
            SamplingParams { temperature: 1.0, seed: Some(1), n: 3, logprobs: Some(1), ..greedy.clone() };
        let others: Vec<_> = (0..3).map(|_| llm.stream("ok the", &drawn).unwrap()).collect();
        assert_eq!(llm.generate("ok the", &greedy).unwrap()[0].tokens, alone[0].tokens);
        let others: Vec<_> = others.into_iter().map(|events| complete(events).unwrap()).collect();
        let ids = |all: &[Completion]| {
            all.iter()
                .map(|one| one.tokens.iter().map(|token| token.id).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&others[0]), ids(&others[1]));
        assert_eq!(ids(&others[1]), ids(&others[2]));
        assert_ne!(others[0][0].tokens, others[0][1].tokens);
        assert!(others[0][2].tokens.iter().all(|token| token.logprobs.as_ref().unwrap().chosen < 0.0));
    }

    /// The file of a small model, with the tokens of another one if its first is renamed.
    fn tiny_file(folder: &tempfile::TempDir, first: Option<&str>, size: usize) -> PathBuf {
        let mut tiny = forward::BIASES.file();
        bytes::add_tokenizer(&mut tiny, "gpt-2", size);
        if let (Some(name), Some(Value::Array(tokens))) =
            (first, tiny.metadata.get_mut("tokenizer.ggml.tokens"))
        {
            tokens[0] = Value::String(name.into());
        }
        tiny.write(folder)
    }

    #[test]
    fn a_model_drafts_for_another() {
        let folder = tempfile::tempdir().unwrap();
        let file = tiny_file(&folder, None, forward::BIASES.vocab);
        let options = LlmOptions { draft_model: Some(vec![file]), ..LlmOptions::default() };
        let (drafted, plain) = (llm(&options), llm(&LlmOptions::default()));
        for temperature in [0.0, 1.0] {
            let params = SamplingParams {
                temperature,
                seed: Some(1),
                max_tokens: Some(30),
                ignore_eos: true,
                n: 2,
                ..SamplingParams::default()
            };
            let tokens = |llm: &Llm| llm.generate("ok the", &params).unwrap().into_iter().map(|it| it.tokens);
            assert!(tokens(&drafted).eq(tokens(&plain)));
        }
        // Whether they pay is another question.
        let stats = drafted.engine().status().stats;
        assert!(stats.drafted > 8 && stats.accepted == stats.drafted, "{stats:?}");
        let none = llm(&LlmOptions { draft: Some(0), ..options });
        none.generate("ok the", &SamplingParams { max_tokens: Some(9), ..SamplingParams::default() })
            .unwrap();
        assert_eq!(none.engine().status().stats.drafted, 0);
    }

    #[test]
    fn a_draft_model_of_other_tokens_is_refused() {
        let vocab = forward::BIASES.vocab;
        let refusal = |first: Option<&str>, size: usize| {
            let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let draft_model = Some(vec![tiny_file(&other, first, size)]);
            let options = LlmOptions { device: Device::Cpu, draft_model, ..LlmOptions::default() };
            Llm::load(&[tiny_file(&folder, None, vocab)], &options).err().unwrap().to_string()
        };
        let problem = refusal(Some("other"), vocab);
        assert!(problem.contains("its token 0 is \"other\", and the model's \"Ā\""), "{problem}");
        let problem = refusal(None, vocab - 1);
        assert!(problem.contains(&format!("{} tokens", vocab - 1)), "{problem}");
    }

    /// Reads a prompt of two parts and a half.
    pub fn check_parts(device: Device, part: usize) {
        let folder = tempfile::tempdir().unwrap();
        let mut tiny = forward::BIASES.file();
        bytes::add_tokenizer(&mut tiny, "gpt-2", forward::BIASES.vocab);
        let context = tiny.metadata.keys().find(|key| key.ends_with(".context_length")).copied().unwrap();
        tiny.metadata.insert(context, Value::U32(3 * part as u32));
        let options = LlmOptions { device, cache_tokens: 3 * part, ..LlmOptions::default() };
        let llm = Llm::load(&[tiny.write(&folder)], &options).unwrap();
        let params = SamplingParams { max_tokens: Some(1), ..SamplingParams::default() };
        llm.generate(&"x".repeat(2 * part + part / 2), &params).unwrap();
        let stats = llm.engine().status().stats;
        assert_eq!((stats.steps, stats.read), (3, 2 * part + part / 2));
    }

    #[test]
    fn prompts_are_read_in_parts_of_256_on_the_cpu() {
        check_parts(Device::Cpu, 256);
    }

    #[test]
    fn a_chat_is_what_its_template_writes() {
        use crate::text::Role;
        let llm = llm(&LlmOptions::default());
        let greedy = SamplingParams { max_tokens: Some(6), ignore_eos: true, ..SamplingParams::default() };
        let chat = [Message::new(Role::User, "ok"), Message::new(Role::User, "the")];
        // Without a template, the texts are continued.
        let answers = llm.chat(&chat, &greedy).unwrap();
        assert_eq!(answers[0].tokens, llm.generate("ok\n\nthe", &greedy).unwrap()[0].tokens);
    }

    #[test]
    fn the_whole_context_is_used_and_an_advice_helps() {
        // A context of 64, which is no reason for fewer pages.
        let small = llm(&LlmOptions { cache_tokens: 33, ..LlmOptions::default() });
        let params = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
        let prompt = "x".repeat(60);
        let error = small.generate(&prompt, &params).unwrap_err().to_string();
        assert!(
            error.contains("60 tokens, and the cache holds 48") && error.contains("--cache-tokens"),
            "{error}"
        );
        let large = llm(&LlmOptions { cache_tokens: 64, ..LlmOptions::default() });
        let answers = large.generate(&prompt, &params).unwrap();
        assert_eq!((answers[0].tokens.len(), &answers[0].end.finish), (5, &Finish::Context));
        let wrong = SamplingParams { n: 0, ..params };
        let error = large.generate("x", &wrong).unwrap_err();
        let error = error.downcast::<crate::request::SubmitError>().unwrap();
        assert!(matches!(*error, crate::request::SubmitError::Parameter(InvalidParameter { name: "n", .. })));
    }

    /// Events and what they are of can go to other threads, and an engine can be shared.
    #[test]
    fn engines_are_for_threads() {
        fn moves<T: Send>() {}
        fn shared<T: Send + Sync>() {}
        moves::<Events>();
        shared::<Llm>();
        shared::<Engine>();
    }
}
