//! Which rank a process is, as launchers say it: torchrun, Open MPI, PMI (MPICH, Intel MPI) and
//! Slurm, in this order.

use std::env;

use crate::{Result, model::shard::Rank};

/// PyTorch's default.
const DEFAULT_PORT: u16 = 29500;

/// Which rank a process is, and where rank 0 is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Which of how many.
    pub rank: Rank,
    /// Its number among those of its machine.
    pub local_rank: usize,
    /// Where rank 0 listens: a name or an address.
    pub address: String,
    /// The port there.
    pub port: u16,
}

/// What a launcher calls the numbers of a process.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static [&'static str],
}

/// Slurm's are those of a step: a batch script, which is one process of a job of several tasks, has
/// no size of a step.
const LAUNCHERS: [Launcher; 4] = [
    Launcher { name: "torchrun", rank: "RANK", size: "WORLD_SIZE", local_rank: &["LOCAL_RANK"] },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    },
    Launcher {
        name: "PMI",
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        size: "SLURM_STEP_NUM_TASKS",
        local_rank: &["SLURM_LOCALID"],
    },
];

impl Placement {
    /// What the environment says; `None` if this process was started alone.
    ///
    /// # Errors
    /// A variable is missing beside others, or is no number that it can be.
    pub fn from_env() -> Result<Option<Self>> {
        Self::of(&|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// What variables say.
    pub(super) fn of(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let started = |launcher: &&Launcher| get(launcher.rank).is_some() && get(launcher.size).is_some();
        let Some(launcher) = LAUNCHERS.iter().find(started) else { return Ok(None) };
        let number = |name: &str| -> Result<usize> {
            let value = get(name).unwrap_or_default();
            let number = value.trim().parse();
            Ok(number.map_err(|_| format!("{name} is `{value}`; expected a number ({})", launcher.name))?)
        };
        let (rank, size) = (number(launcher.rank)?, number(launcher.size)?);
        if rank >= size {
            let expected = format!("expected one below {} = {size}", launcher.size);
            return Err(format!("{} is {rank}; {expected}", launcher.rank).into());
        }
        if size == 1 {
            return Ok(None);
        }
        let local_rank = launcher.local_rank.iter().find(|name| get(name).is_some());
        let local_rank = match local_rank {
            Some(name) => number(name)?,
            None => {
                let names = launcher.local_rank.join(" or ");
                return Err(format!("{names} is missing beside {} ({})", launcher.rank, launcher.name).into());
            }
        };
        let port = match get("MASTER_PORT") {
            None => DEFAULT_PORT,
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(format!("MASTER_PORT is `{port}`; expected 1 to 65535").into()),
            },
        };
        // torchrun listens there itself.
        let taken =
            get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let port = if taken { port.checked_add(1).unwrap_or(port - 1) } else { port };
        let address = match get("MASTER_ADDR").or_else(|| first_host(&get("SLURM_STEP_NODELIST")?)) {
            Some(address) => address,
            None if local_rank == rank => "127.0.0.1".into(),
            None => {
                let problem = format!("rank {rank} is process {local_rank} of its machine");
                return Err(format!(
                    "MASTER_ADDR is missing, and {problem}; set it to the machine of rank 0"
                )
                .into());
            }
        };
        Ok(Some(Self { rank: Rank { rank, size }, local_rank, address, port }))
    }
}

/// The first machine of a list of Slurm's, as `node[03-05,9],other`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let Some(numbers) = rest.strip_prefix('[') else {
        return Some(name.into()).filter(|name: &String| !name.is_empty());
    };
    let (numbers, behind) = numbers.split_once(']')?;
    let number = numbers.split([',', '-']).next()?;
    let suffix = behind.split(',').next().unwrap_or_default();
    (!suffix.contains('[')).then(|| format!("{name}{number}{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Placement>> {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Placement::of(&get)
    }

    fn placement(rank: usize, size: usize, local_rank: usize, address: &str, port: u16) -> Placement {
        Placement { rank: Rank { rank, size }, local_rank, address: address.into(), port }
    }

    #[test]
    fn launchers_say_which_rank_a_process_is() {
        let torchrun = [
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node1"),
            ("MASTER_PORT", "1234"),
        ];
        assert_eq!(of(&torchrun).unwrap(), Some(placement(5, 8, 1, "node1", 1234)));
        let agent = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(of(&agent).unwrap(), Some(placement(5, 8, 1, "node1", 1235)));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ];
        assert_eq!(of(&mpi).unwrap(), Some(placement(1, 2, 1, "127.0.0.1", DEFAULT_PORT)));
        let pmi = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MASTER_ADDR", "::1")];
        assert_eq!(of(&pmi).unwrap(), Some(placement(1, 2, 0, "::1", DEFAULT_PORT)));
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ];
        assert_eq!(of(&slurm).unwrap(), Some(placement(3, 4, 1, "gpu07", DEFAULT_PORT)));
    }

    #[test]
    fn a_process_that_is_alone_has_no_rank() {
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
        // A batch script of Slurm's.
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let base = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")];
        let wrong = [
            (("RANK", "2"), "RANK is 2; expected one below WORLD_SIZE = 2"),
            (("RANK", "-1"), "RANK is `-1`; expected a number (torchrun)"),
            (("WORLD_SIZE", "two"), "WORLD_SIZE is `two`"),
            (("LOCAL_RANK", "x"), "LOCAL_RANK is `x`"),
            (("LOCAL_RANK", "0"), "MASTER_ADDR is missing, and rank 1 is process 0"),
            (("MASTER_PORT", "0"), "MASTER_PORT is `0`"),
            (("MASTER_PORT", "70000"), "MASTER_PORT is `70000`"),
        ];
        for (variable, problem) in wrong {
            let error = of(&[&[variable][..], &base].concat()).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        let error = of(&base[..2]).unwrap_err().to_string();
        assert!(error.contains("LOCAL_RANK is missing beside RANK"), "{error}");
    }

    #[test]
    fn the_first_of_slurms_machines_is_found() {
        let lists = [
            ("a", Some("a")),
            ("a,b", Some("a")),
            ("node[3,5-9]", Some("node3")),
            ("node[003-005],x", Some("node003")),
            ("r[1-2]n1", Some("r1n1")),
            ("", None),
            ("r[1-2]n[1-2]", None),
            ("r[1", None),
        ];
        for (list, host) in lists {
            assert_eq!(first_host(list).as_deref(), host, "{list}");
        }
    }
}
