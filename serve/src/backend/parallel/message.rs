//! What rank 0 tells the others, and they tell it.

use std::{mem, sync::Arc};

use flashinfer_rs::{
    indices::LogitEdit,
    kv::{BatchSnapshot, PageCopy, RequestSnapshot},
};
use serde::{Deserialize, Serialize};
use toktrie::SimpleVob;

use crate::{
    Result,
    backend::{LastEdit, Output, Sample, Step, StepToken},
};

/// What a rank is to do.
#[derive(Serialize, Deserialize)]
pub enum Command {
    Enqueue(StepMessage),
    Collect,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Outcome {
    Enqueued,
    /// The tokens of the outputs.
    Chosen(Vec<Option<u32>>),
    Failed(String),
}

impl Outcome {
    /// Of what succeeded, as `outcome` says it.
    pub fn of<T>(done: &Result<T>, outcome: impl FnOnce(&T) -> Self) -> Self {
        match done {
            Ok(done) => outcome(done),
            Err(error) => Self::Failed(error.to_string()),
        }
    }

    pub fn chosen(samples: &[Sample]) -> Self {
        Self::Chosen(samples.iter().map(|sample| sample.token).collect())
    }

    /// Whether ranks can go on after these. All may fail, each in its own words.
    pub fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Enqueued, Self::Enqueued) | (Self::Failed(_), Self::Failed(_)) => true,
            (Self::Chosen(ours), Self::Chosen(theirs)) => ours == theirs,
            _ => false,
        }
    }
}

/// A step.
#[derive(Serialize, Deserialize)]
pub struct StepMessage {
    /// The pages of each request, its tokens, and how many of them are new.
    requests: Vec<(Vec<i32>, usize, usize)>,
    /// Sources and targets.
    copies: Vec<(i32, i32)>,
    free_page: Option<i32>,
    tokens: Vec<StepToken>,
    outputs: Vec<OutputMessage>,
}

#[derive(Serialize, Deserialize)]
struct OutputMessage {
    row: usize,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    uniform: f32,
    edits: Vec<EditMessage>,
    /// The repetition penalty and bias of most tokens, and the edits of others.
    last_edit: Option<(f32, f32, Vec<EditMessage>)>,
    logprobs: Option<usize>,
    allowed: Option<Bits>,
}

/// A token, its repetition penalty and bias.
type EditMessage = (u32, f32, f32);

/// How many bits, and their words.
type Bits = (usize, Vec<u32>);

impl StepMessage {
    pub fn new(step: &Step<'_>) -> Self {
        let BatchSnapshot { requests, copies, free_page } = step.batch.snapshot();
        let requests = requests.into_iter().map(|request| (request.pages, request.len, request.new_tokens));
        Self {
            requests: requests.collect(),
            copies: copies.iter().map(|copy| (copy.source, copy.target)).collect(),
            free_page,
            tokens: step.tokens.to_vec(),
            outputs: step.outputs.iter().map(OutputMessage::new).collect(),
        }
    }

    /// What it says of pages, which are taken out of it.
    pub fn take_snapshot(&mut self) -> BatchSnapshot {
        let requests = mem::take(&mut self.requests).into_iter();
        let requests = requests.map(|(pages, len, new_tokens)| RequestSnapshot { pages, len, new_tokens });
        BatchSnapshot {
            requests: requests.collect(),
            copies: self.copies.iter().map(|&(source, target)| PageCopy { source, target }).collect(),
            free_page: self.free_page,
        }
    }

    pub fn tokens(&self) -> &[StepToken] {
        &self.tokens
    }

    pub fn outputs(&self) -> Vec<Output> {
        self.outputs.iter().map(OutputMessage::output).collect()
    }
}

impl OutputMessage {
    fn new(output: &Output) -> Self {
        let Output {
            row,
            temperature,
            top_k,
            top_p,
            min_p,
            uniform,
            edits: all,
            last_edit,
            logprobs,
            allowed,
        } = output;
        let edits = |edits: &[LogitEdit]| {
            edits.iter().map(|edit| (edit.token, edit.repetition_penalty, edit.bias)).collect()
        };
        let last = |last: &LastEdit| (last.repetition_penalty, last.bias, edits(&last.others));
        let bits = |allowed: &Arc<SimpleVob>| (allowed.len(), allowed.as_slice().to_vec());
        Self {
            row: *row,
            temperature: *temperature,
            top_k: *top_k,
            top_p: *top_p,
            min_p: *min_p,
            uniform: *uniform,
            edits: edits(all),
            last_edit: last_edit.as_ref().map(last),
            logprobs: *logprobs,
            allowed: allowed.as_ref().map(bits),
        }
    }

    fn output(&self) -> Output {
        let edit =
            |&(token, repetition_penalty, bias): &EditMessage| LogitEdit { token, repetition_penalty, bias };
        let edits = |edits: &[EditMessage]| edits.iter().map(edit).collect();
        let last = |&(repetition_penalty, bias, ref others): &(f32, f32, Vec<EditMessage>)| LastEdit {
            repetition_penalty,
            bias,
            others: edits(others),
        };
        let allowed = |(len, words): &Bits| {
            let mut allowed = SimpleVob::alloc(*len);
            let is_set =
                |token: &usize| words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
            (0..*len).filter(is_set).for_each(|token| allowed.allow_token(token as u32));
            Arc::new(allowed)
        };
        Output {
            row: self.row,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            uniform: self.uniform,
            edits: edits(&self.edits),
            last_edit: self.last_edit.as_ref().map(last),
            logprobs: self.logprobs,
            allowed: self.allowed.as_ref().map(allowed),
        }
    }
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

    use super::*;

    #[test]
    fn a_step_comes_as_it_was_sent() {
        let pool = PageAllocator::new(9, 4).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([6]).unwrap();
        let fork = batch.sequences()[0].fork();
        batch.push(fork).unwrap();
        batch.append([1, 2]).unwrap();
        let mut allowed = SimpleVob::alloc(100);
        [0, 31, 32, 99].into_iter().for_each(|token| allowed.allow_token(token));
        let all = Output {
            row: 1,
            temperature: 0.7,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            uniform: 0.5,
            edits: vec![LogitEdit { token: 4, repetition_penalty: 1.5, bias: -0.5 }, LogitEdit::ban(7)],
            last_edit: None,
            logprobs: Some(2),
            allowed: Some(Arc::new(allowed)),
        };
        let last_edit = LastEdit { repetition_penalty: 1.5, bias: -0.75, others: all.edits.clone() };
        let penalized = Output { row: 2, last_edit: Some(last_edit), ..Output::greedy(2) };
        let outputs = [Output::greedy(0), all, penalized];
        let tokens = [StepToken::Known(5), StepToken::Chosen(0), StepToken::Known(70_000)];
        let step = Step { batch: &batch, tokens: &tokens, outputs: &outputs };
        let bytes = postcard::to_stdvec(&Command::Enqueue(StepMessage::new(&step))).unwrap();
        let Ok(Command::Enqueue(mut message)) = postcard::from_bytes(&bytes) else {
            panic!("it is a step");
        };
        let snapshot = message.take_snapshot();
        assert_eq!(snapshot, batch.snapshot());
        assert_eq!(snapshot.copies.len(), 1);
        assert_eq!((message.tokens(), &message.outputs()[..]), (&tokens[..], &outputs[..]));
    }
}
