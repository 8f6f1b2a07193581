# offshoot boot protocol 1
# The boot script of a device with U-Boot. docs/boot-protocol.md has the table. Make boot.scr of it, at the top of the boot partition:
#   mkimage -T script -A arm64 -n offshoot -d boot.cmd boot.scr
# Needs of U-Boot: hush, test, load, source, env import, saveenv, env load (CONFIG_CMD_NVEDIT_LOAD), booti, sleep, reset. Shell variables (not
# environment variables) hold what must not be saved. No arithmetic: a count grows by comparison.

# Where this script came from and what the board found out; "env load" below may forget them.
offshoot_type="${devtype}"
offshoot_part="${devnum}:${distro_bootpart}"
offshoot_prefix="${prefix}"
offshoot_control="${fdtcontroladdr}"
offshoot_board="${fdtfile}"

# What was read. Nothing counts of an environment without the mark (offshoot_count) or with a value out of range: the compiled-in one.
offshoot_armed=lost
offshoot_number=none
for offshoot_n in 0 1 2 3 4 5 6 7 8 9; do
  if test "${bootcount}" = "${offshoot_n}"; then offshoot_number=1; fi
done
offshoot_limited=none
for offshoot_n in 1 2 3 4 5 6 7 8 9; do
  if test "${bootlimit}" = "${offshoot_n}"; then offshoot_limited=1; fi
done
if test "${offshoot_count}" = bootcount; then
  # U-Boot wrote this number itself, a moment ago, and it may have two digits.
  offshoot_number=1
elif test "${offshoot_count}" = script; then
  true
else
  offshoot_number=none
fi
if test "${rollback}" = 0 || test "${rollback}" = 1; then
  true
else
  offshoot_number=none
fi
if test "${offshoot_number}${offshoot_limited}" = 11; then
  if test "${upgrade_available}" = 0; then offshoot_armed=no; fi
  if test "${upgrade_available}" = 1; then offshoot_armed=yes; fi
fi

# Who counts, for the kernel command line. With nothing on trial U-Boot's counter stands at 1 on every boot, if there is one.
offshoot_counts=script
if test "${offshoot_armed}" = yes; then
  if test "${offshoot_count}${bootcount}" = bootcount0; then true; else offshoot_counts="${offshoot_count}"; fi
elif test "${bootcount}" = 1; then
  offshoot_counts=bootcount
fi

# The decision.
offshoot_fallback=
offshoot_arguments=
offshoot_decision="booting entry 0"
if test "${offshoot_armed}" = lost; then
  offshoot_fallback=corrupt
  # The compiled-in variables are saved once, without the mark, so that userspace has something to write over.
  if test "${offshoot_lost}" = 1; then true; else
    setenv offshoot_lost 1
    saveenv
  fi
elif test "${offshoot_armed}" = yes; then
  if test "${rollback}" = 1; then
    offshoot_fallback=exhausted
  else
    offshoot_tried="${bootcount}"
    offshoot_spent=
    if test "${offshoot_count}" = script; then
      if test ${bootcount} -ge ${bootlimit}; then offshoot_spent=1; fi
      offshoot_before=0
      for offshoot_n in 1 2 3 4 5 6 7 8 9; do
        if test "${bootcount}" = "${offshoot_before}"; then offshoot_tried="${offshoot_n}"; fi
        offshoot_before="${offshoot_n}"
      done
    elif test ${bootcount} -gt ${bootlimit}; then
      offshoot_spent=1
    fi
    offshoot_of="${bootlimit}"
    if test -n "${offshoot_spent}"; then
      offshoot_fallback=exhausted
      setenv rollback 1
      saveenv
    elif test "${offshoot_count}${bootcount}" = bootcount0; then
      # It was to be counted by a U-Boot that does not count.
      offshoot_fallback=unsaved
    else
      if test "${offshoot_count}" = script; then
        setenv bootcount "${offshoot_tried}"
        saveenv
      fi
      # Read back: on FAT and ext4 saveenv says OK of a write that failed, and U-Boot's own counter does not even ask.
      setenv bootcount
      env load
      if test "${bootcount}" = "${offshoot_tried}"; then
        offshoot_arguments="offshoot.trial=${offshoot_tried} panic=10 rd.shell=0 rd.emergency=reboot"
        offshoot_decision="trial ${offshoot_tried} of ${offshoot_of}, booting entry 0"
      else
        offshoot_fallback=unsaved
      fi
    fi
  fi
fi
if test -n "${offshoot_fallback}"; then
  offshoot_arguments="offshoot.fallback=${offshoot_fallback}"
  offshoot_decision="fallback (${offshoot_fallback})"
fi
# --- boot ---
# Boots what was decided, from what libostree wrote (uEnv.txt: the default's variables, and those of entry 1 with a 2 at the end). Nothing is
# saved from here on. What cannot be loaded never ends at a prompt: nobody is there.
echo "offshoot: ${offshoot_decision}"
if test -z "${offshoot_prefix}"; then offshoot_prefix=/; fi
if test -z "${offshoot_boot}"; then offshoot_boot=booti; fi
for offshoot_n in kernel_image ramdisk_image fdt_file fdtdir bootargs kernel_image2 ramdisk_image2 fdt_file2 fdtdir2 bootargs2; do
  setenv ${offshoot_n}
done
if load ${offshoot_type} ${offshoot_part} ${scriptaddr} ${offshoot_prefix}loader/uEnv.txt; then
  env import -t ${scriptaddr} ${filesize} kernel_image ramdisk_image fdt_file fdtdir bootargs kernel_image2 ramdisk_image2 fdt_file2 fdtdir2 bootargs2
fi
offshoot_entries=0
if test -n "${kernel_image2}"; then
  if test -n "${offshoot_fallback}"; then
    offshoot_entries=1
  elif test -z "${offshoot_arguments}"; then
    offshoot_entries="0 1"
  fi
fi
for offshoot_entry in ${offshoot_entries}; do
  echo "offshoot: loading entry ${offshoot_entry}"
  offshoot_kernel="${kernel_image}"
  offshoot_ramdisk="${ramdisk_image}"
  offshoot_fdt="${fdt_file}"
  offshoot_fdtdir="${fdtdir}"
  if test ${offshoot_entry} = 1; then
    offshoot_kernel="${kernel_image2}"
    offshoot_ramdisk="${ramdisk_image2}"
    offshoot_fdt="${fdt_file2}"
    offshoot_fdtdir="${fdtdir2}"
    if test -z "${offshoot_arguments}"; then offshoot_arguments="offshoot.fallback=unloadable"; fi
  fi
  if test -z "${offshoot_fdt}" && test -n "${offshoot_fdtdir}" && test -n "${offshoot_board}"; then
    offshoot_fdt="${offshoot_fdtdir}/${offshoot_board}"
  fi
  offshoot_loaded=1
  if load ${offshoot_type} ${offshoot_part} ${kernel_addr_r} ${offshoot_kernel}; then true; else offshoot_loaded=; fi
  offshoot_initrd=-
  if test -n "${offshoot_ramdisk}"; then
    if load ${offshoot_type} ${offshoot_part} ${ramdisk_addr_r} ${offshoot_ramdisk}; then
      offshoot_initrd="${ramdisk_addr_r}:${filesize}"
    else
      offshoot_loaded=
    fi
  fi
  offshoot_tree="${offshoot_control}"
  if test -n "${offshoot_fdt}"; then
    if load ${offshoot_type} ${offshoot_part} ${fdt_addr_r} ${offshoot_fdt}; then
      offshoot_tree="${fdt_addr_r}"
    else
      offshoot_loaded=
    fi
  fi
  if test -n "${offshoot_loaded}"; then
    # Without its arguments a kernel is not started: what boots would not be what userspace is told. hush cannot quote a single quote, and
    # then silently sets nothing.
    setenv offshoot_line
    if test ${offshoot_entry} = 1; then
      setenv offshoot_line "${bootargs2} ${offshoot_arguments} offshoot.counts=${offshoot_counts}"
      setenv bootargs "${bootargs2} ${offshoot_arguments} offshoot.counts=${offshoot_counts}"
    else
      setenv offshoot_line "${bootargs} ${offshoot_arguments} offshoot.counts=${offshoot_counts}"
      setenv bootargs "${bootargs} ${offshoot_arguments} offshoot.counts=${offshoot_counts}"
    fi
    if printenv offshoot_line; then
      ${offshoot_boot} ${kernel_addr_r} ${offshoot_initrd} ${offshoot_tree}
    fi
  fi
  echo "offshoot: entry ${offshoot_entry} cannot be loaded"
done
if test -z "${offshoot_fallback}" && test -n "${offshoot_arguments}" && test "${offshoot_entries}" = 0; then
  # A trial: the counter runs out.
  reset
fi
echo "offshoot: nothing can be loaded, trying again in 30 seconds"
sleep 30
reset
