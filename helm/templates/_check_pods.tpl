{{/* What a pod's lists may hold beside the chart's own: one list with itself, or with another. The API server would refuse
these in the middle of an install, or take the last of two. */}}
{{- define "lowbit.checkPods" -}}
{{- include "lowbit.checkEnv" . -}}
{{- include "lowbit.checkVolumes" . -}}
{{- include "lowbit.checkContainers" . -}}
{{- include "lowbit.checkPlacement" . -}}
{{- include "lowbit.checkResources" (list . "resources" .Values.resources) -}}
{{- if .Values.quantize.enabled -}}
{{- include "lowbit.checkResources" (list . "quantize.resources" .Values.quantize.resources) -}}
{{- end -}}
{{- if .Values.loadtest.enabled -}}
{{- include "lowbit.checkResources" (list . "loadtest.resources" .Values.loadtest.resources) -}}
{{- end -}}
{{- range $key := keys .Values.podAnnotations -}}
{{- if or (eq $key "checksum/settings") (hasPrefix "checkov.io/" $key) -}}
{{- fail (printf "podAnnotations names %s, which the chart sets; choose another key" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkEnv" -}}
{{- $seen := list -}}
{{- range .Values.extraEnv -}}
{{- if hasPrefix "LOWBIT_" .name -}}
{{- fail (printf "extraEnv names %s: `server` sets every LOWBIT_ variable, test.apiKey that of the load test" .name) -}}
{{- end -}}
{{- if has .name (list "HOME" "USER" "HF_HUB_OFFLINE" "HF_TOKEN_PATH" "VLLM_NO_USAGE_STATS" "VLLM_HOST_IP" "PARTS" "JOB_COMPLETION_INDEX" "JOB_NAME" "RANK" "WORLD_SIZE" "MASTER_ADDR" "MASTER_PORT") -}}
{{- fail (printf "extraEnv names %s, which the chart sets; leave it out" .name) -}}
{{- end -}}
{{- if has .name $seen -}}
{{- fail (printf "extraEnv names %s twice; one of them would win silently" .name) -}}
{{- end -}}
{{- if and (hasKey . "value") (hasKey . "valueFrom") -}}
{{- fail (printf "extraEnv: %s has both value and valueFrom; give one of them" .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- range .Values.extraEnvFrom -}}
{{- if ne (len (omit . "prefix")) 1 -}}
{{- fail "extraEnvFrom: each entry needs one of configMapRef and secretRef" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkVolumes" -}}
{{- $own := list "checkpoint" "tmp" "cache" "shared-memory" "api-keys" "tls" "tls-ca" "hub-token" "results" "scenario" -}}
{{- $names := list -}}
{{- range .Values.extraVolumes -}}
{{- if has .name $own -}}
{{- fail (printf "extraVolumes names %s, which is a volume of the chart; choose another name (compile caches on a claim: volumes.cacheClaim)" .name) -}}
{{- end -}}
{{- if has .name $names -}}
{{- fail (printf "extraVolumes names %s twice; each volume has a name of its own" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $paths := list "/checkpoint" "/tmp" "/cache" "/dev/shm" "/etc/lowbit/keys" "/etc/lowbit/tls" "/etc/lowbit/ca" "/etc/lowbit/hub" "/results" "/scenario" -}}
{{- range .Values.extraVolumeMounts -}}
{{- $path := clean .mountPath -}}
{{- if not (has .name (concat $names (list "tmp" "cache"))) -}}
{{- fail (printf "extraVolumeMounts: %s is no volume of extraVolumes; add it there" .name) -}}
{{- end -}}
{{- if has $path $paths -}}
{{- fail (printf "extraVolumeMounts: something is mounted at %s already; choose another path" $path) -}}
{{- end -}}
{{- $paths = append $paths $path -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkContainers" -}}
{{- $names := list "server" "follower" "wait-for-checkpoint" "download-checkpoint" -}}
{{- range concat .Values.initContainers .Values.sidecars -}}
{{- if has .name $names -}}
{{- fail (printf "initContainers and sidecars: the name %s is taken; each container of a pod has a name of its own" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkPlacement" -}}
{{- range .Values.tolerations -}}
{{- $exists := eq (default "Equal" .operator) "Exists" -}}
{{- if and $exists .value -}}
{{- fail (printf "tolerations: operator Exists takes no value; it has %s" .value) -}}
{{- end -}}
{{- if and (not $exists) (not .key) -}}
{{- fail "tolerations: an entry without key needs operator Exists" -}}
{{- end -}}
{{- if and (hasKey . "tolerationSeconds") (ne (default "" .effect) "NoExecute") -}}
{{- fail "tolerations: tolerationSeconds needs effect NoExecute" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.dnsPolicy "None") (not .Values.dnsConfig.nameservers) -}}
{{- fail "dnsPolicy is None, which needs dnsConfig.nameservers" -}}
{{- end -}}
{{- $claims := list -}}
{{- range .Values.resourceClaims -}}
{{- if has .name $claims -}}
{{- fail (printf "resourceClaims names %s twice; each claim of a pod has a name of its own" .name) -}}
{{- end -}}
{{- $claims = append $claims .name -}}
{{- end -}}
{{- end -}}

{{/* (list $ WHERE RESOURCES) */}}
{{- define "lowbit.checkResources" -}}
{{- $ := first . -}}
{{- $where := index . 1 -}}
{{- $resources := last . -}}
{{- range $side := list "requests" "limits" -}}
{{- if hasKey (get $resources $side) $.Values.gpu.resourceName -}}
{{- fail (printf "%s.%s names %s; set gpu.count (or quantize.gpuCount), from which the parallel sizes follow too" $where $side $.Values.gpu.resourceName) -}}
{{- end -}}
{{- end -}}
{{- range $name, $request := $resources.requests -}}
{{- $limit := get $resources.limits $name -}}
{{- $shared := has $name (list "cpu" "memory" "ephemeral-storage") -}}
{{- if and (not $shared) (ne (toString $limit) (toString $request)) -}}
{{- fail (printf "%s.requests has %s: %v, which is never shared: give the same in %s.limits, or only there" $where $name $request $where) -}}
{{- end -}}
{{- if and $shared (hasKey $resources.limits $name) (gt (include "lowbit.amount" $request | float64) (include "lowbit.amount" $limit | float64)) -}}
{{- fail (printf "%s.requests.%s is %v, above %s.limits.%s, %v" $where $name $request $where $name $limit) -}}
{{- end -}}
{{- end -}}
{{- $claims := list -}}
{{- range $.Values.resourceClaims }}{{ $claims = append $claims .name }}{{ end -}}
{{- $used := list -}}
{{- range $resources.claims -}}
{{- if not (has .name $claims) -}}
{{- fail (printf "%s.claims names %s, which is not in resourceClaims; add it there" $where .name) -}}
{{- end -}}
{{- if has .name $used -}}
{{- fail (printf "%s.claims names %s twice" $where .name) -}}
{{- end -}}
{{- $used = append $used .name -}}
{{- end -}}
{{- end -}}

{{/* A quantity as a number: 1.5Gi, 500m. */}}
{{- define "lowbit.amount" -}}
{{- $text := toString . -}}
{{- $scales := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- $suffix := ternary "" (regexFind "[a-zA-Z]+$" $text) (kindIs "float64" .) -}}
{{- mulf (trimSuffix $suffix $text | float64) (default 1 (get $scales $suffix) | float64) -}}
{{- end -}}
